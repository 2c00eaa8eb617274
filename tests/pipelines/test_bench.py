"""What `medtvt-rl bench` starts from and waits for. Nothing here starts an actor."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actors.bundles import Bundle
from actors.placement import PlacementError
from medtvt_rl.config import Config, RunConfig, load_config
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.data.tokenizer import byte_tokenizer
from medtvt_rl.roles import PlacementConfig
from medtvt_rl.simulation.fit import Generated
from pipelines import bench, replay
from pipelines.bench_roles import Measured
from pipelines.reporter import Reporter

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT, STUDIES = CONFIGS / "text_task.yaml", CONFIGS / "quickstart.yaml"
SOURCE = "model.init_from=medtvt_rl.model.smollm2:SOURCE"


@pytest.mark.parametrize(
    ("path", "settings", "stages"),
    [
        (STUDIES, [], "[cohort,pretrain,sft]"),
        (STUDIES, ["run.stages=[pretrain,sft,grpo]"], "[pretrain,sft]"),
        (TEXT, [], "[sft]"),
        (STUDIES, ["model.init={folder}", SOURCE], "[cohort,pretrain,sft]"),
    ],
)
def test_without_a_model_it_names_the_stages_of_this_run_that_make_one(
    tmp_path: Path, path: Path, settings: list[str], stages: str
) -> None:
    given = [f"run.root={tmp_path}", *(each.format(folder=tmp_path / "llama") for each in settings)]
    with pytest.raises(ConfigError, match=r"medtvt-rl run -c CONFIG run\.stages=") as refused:
        bench.find_model(load_config(path, given), None)
    assert str(refused.value).endswith(f" run.stages={stages}")
    load_config(path, [*given, f"run.stages={stages}"])


def test_a_language_model_begins_a_text_task_alone(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    given = [f"run.root={tmp_path}", f"model.init={folder}"]
    without_sft = load_config(TEXT, [*given, "run.stages=[grpo,evaluate]"])
    with pytest.raises(ConfigError, match=r"or set model\.init to the model"):
        bench.find_model(without_sft, None)
    assert bench.find_model(load_config(TEXT, [*given, SOURCE]), None) == folder, "it is written before it is needed"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert bench.find_model(without_sft, None) == folder
    with pytest.raises(ConfigError, match="there is no model"):
        bench.find_model(without_sft, tmp_path / "another")
    with pytest.raises(ConfigError, match="there is no model"):
        bench.find_model(load_config(STUDIES, given), None)
    (folder / "config.json").write_text('{"model_type": "medtvt"}')
    (folder / "tokenizer_config.json").write_text("{}")
    assert bench.find_model(load_config(STUDIES, given), None) == folder


def test_the_machine_has_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtvt_rl.data.parallel.CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7})
    lengths = ((20, 30), (10, 40))
    found = Measured(
        generated=[Generated(seconds=1.0, lengths=lengths, prompt_tokens=(10, 12))],
        answers=[0.1],
        scored=[0.1],
        trained=[(100, 1.0), (200, 2.0)],
        probes=[0.1],
        exports=[0.1],
        loads=[0.1],
        driver_calls=10,
        driver_cpu_s=0.01,
        asides=[(1.0, 1.0)],
    )
    timings = bench.timings_of(Config(), found, start_s=1.0, prompt_tokens=10.0)
    assert (timings.cores, timings.beside) == (2, 1.0)


@pytest.mark.parametrize("command", ["bench", "replay"])
def test_a_wait_for_a_place_is_told_and_follows_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    config = Config(run=RunConfig(name="r", root=str(tmp_path)))
    config.placement.fallback_after_s = 30.0
    given: list[PlacementConfig] = []

    def place(bundles: Sequence[Bundle], settings: PlacementConfig, report: Callable[[str], None]) -> None:
        given.append(settings)
        report("placement waits")
        raise PlacementError("no node")

    monkeypatch.setattr("actors.placement.place", place)
    monkeypatch.setattr("pipelines.replay.place", place)
    monkeypatch.setattr("pipelines.grpo.load_prompts", lambda *_: [])
    byte_tokenizer().save_pretrained(tmp_path)
    shown = io.StringIO()
    with Reporter(tmp_path, stream=shown) as reporter, pytest.raises(PlacementError):
        if command == "bench":
            bench.run(config, tmp_path, tmp_path / "timings.json", reporter)
        else:
            replay.run(config, [{"step": 0}], reporter)
    assert given == [config.placement] and "placement waits" in shown.getvalue()
