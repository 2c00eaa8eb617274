"""What a finished stage leaves behind, and what may start from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import pipelines.cohort
import pipelines.grpo
import pipelines.sft
from medtvt_rl.config import Config, load_config
from pipelines.checkpoints import CheckpointStore
from pipelines.reporter import Reporter
from pipelines.stages import (
    StageError,
    check_finished,
    run_stage,
    start_model,
    trained_model,
    write_json,
    write_summary,
)

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(QUICKSTART, [f"run.root={tmp_path}"])


def leave(config: Config, stage: str, finish: bool = True) -> Path:
    """The model of a stage, with its marker if it is finished."""
    folder = config.stage_folder(stage) / "model"
    folder.mkdir(parents=True)
    if finish:
        write_json(folder.parent / "finished.json", {"settings": {}, "seconds": 1.0, "peak_rss_bytes": 1})
    return folder


def test_running_an_earlier_stage_again_forgets_the_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.sft
    from pipelines.reporter import Reporter

    config = load_config(QUICKSTART, [f"run.root={tmp_path}"])
    marker = config.stage_folder("grpo") / "finished.json"
    write_json(marker, {"settings": {}, "seconds": 1.0, "peak_rss_bytes": 1})
    monkeypatch.setattr(pipelines.sft, "run", lambda config, reporter: {"summary": {}})
    with Reporter(config.folder) as reporter:
        reporter.start("sft", 1, "step")
        run_stage("sft", config, reporter)
    assert not marker.exists()
    assert (config.stage_folder("sft") / "finished.json").is_file()


def test_a_model_counts_only_with_its_stage_s_marker(config: Config) -> None:
    with pytest.raises(StageError, match=r"there is no .*grpo/model; run `medtvt-rl grpo`"):
        trained_model("grpo", config)
    leave(config, "grpo", finish=False)
    with pytest.raises(StageError, match=r"unfinished or outdated grpo stage; run `medtvt-rl grpo`"):
        trained_model("grpo", config)
    leave(config, "sft", finish=False)
    with pytest.raises(StageError, match="run `medtvt-rl sft`"):
        start_model(config)
    write_json(config.stage_folder("sft") / "finished.json", {})
    assert start_model(config) == config.stage_folder("sft") / "model"


def test_grpo_starts_from_a_given_model_where_sft_is_left_out(tmp_path: Path) -> None:
    overrides = [f"run.root={tmp_path}", "model.init=given", "run.stages=[grpo,evaluate]"]
    config = load_config(QUICKSTART, overrides)
    assert start_model(config) == Path("given")
    left = leave(config, "sft")
    assert start_model(config) == left


def test_sft_starts_from_a_finished_pretrain_stage_or_from_a_given_model(config: Config, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"run `medtvt-rl pretrain` .* or take pretrain out of run.stages"):
        pipelines.sft._start_folder(config)
    left = leave(config, "pretrain", finish=False)
    with pytest.raises(StageError, match="unfinished or outdated pretrain stage"):
        pipelines.sft._start_folder(config)
    given = load_config(QUICKSTART, [f"run.root={tmp_path}", "model.init=given", "run.stages=[sft,grpo]"])
    assert pipelines.sft._start_folder(given) == Path("given")
    write_json(left.parent / "finished.json", {})
    assert pipelines.sft._start_folder(given) == pipelines.sft._start_folder(config) == left


def test_nothing_goes_on_from_the_checkpoints_of_a_finished_grpo_stage(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore.of(config)

    def train(config: Config, reporter: Reporter) -> dict[str, object]:
        assert not store.is_finished
        return {"summary": {}}

    monkeypatch.setattr(pipelines.grpo, "run", train)
    with Reporter(config.folder) as reporter:
        run_stage("grpo", config, reporter)
    assert store.is_finished


def test_stages_behind_an_unfinished_one_are_not_asked(config: Config) -> None:
    leave(config, "grpo")
    check_finished(config.run.stages, config)
    with pytest.raises(StageError, match=r"grpo of .* is finished with other settings"):
        check_finished(["grpo"], config)


def test_numbers_that_json_does_not_have_become_null(config: Config) -> None:
    left = {
        "seconds": 1.0,
        "peak_rss_bytes": 1,
        "summary": {"grpo": {"gap": math.inf, "rewards": [0.5, math.nan], "steps": 3}},
    }
    write_json(config.stage_folder("grpo") / "finished.json", left)
    assert write_summary(config)["grpo"] == {"gap": None, "rewards": [0.5, None], "steps": 3}
    text = (config.folder / "summary.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["simulated"] is True


def test_a_cohort_found_ready_keeps_what_it_cost(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = config.stage_folder("cohort") / "finished.json"
    write_json(marker, {"settings": {}, "seconds": 31.5, "peak_rss_bytes": 7})
    for built in (False, True):
        result = {"summary": {"cohort": {"problems": 0}}, "built": built}
        monkeypatch.setattr(pipelines.cohort, "run", lambda config, reporter, result=result: result)
        with Reporter(config.folder) as reporter:
            reporter.start("cohort", 1, "study")
            run_stage("cohort", config, reporter)
        assert (json.loads(marker.read_text())["seconds"] == 31.5) is not built


def test_a_whole_cohort_stage_says_whether_it_built(tmp_path: Path) -> None:
    sizes = ["cohort.num_train=6", "cohort.num_validation=2", "cohort.num_test=2", "data.num_workers=1"]
    config = load_config(QUICKSTART, [f"run.root={tmp_path}", *sizes])
    with Reporter(config.folder) as reporter:
        assert pipelines.cohort.run(config, reporter)["built"] is True
        assert pipelines.cohort.run(config, reporter)["built"] is False
