"""PT and SFT as Ray Train jobs on a small simulated cohort, two workers each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoTokenizer

from actors.placement import Bundle
from medtvt_rl.config import Config, load_config
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import load_policy
from pipelines import pretrain, sft, supervised
from pipelines.stages import StageError, write_json

pytestmark = pytest.mark.cluster
PROJECT = Path(__file__).parents[2]
SMALL = [
    "cohort.num_train=48",
    "cohort.num_validation=8",
    "cohort.num_test=4",
    "encoders.ecg_steps=6",
    "encoders.cxr_steps=6",
    "encoders.lab_steps=6",
    "pretrain.epochs=1",
    "pretrain.batch_size=16",
    "sft.epochs=2",
    "sft.batch_size=16",
    "sft.validation_studies=4",
    "sft.validation_samples=2",
    "data.film.crop=center",
]


class Said:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.lines: list[str] = []
        self.done: dict[str, int] = {}
        self.steps: dict[str, list[int]] = {}

    def start(self, stage: str, total: int | None = None, unit: str = "step") -> None:
        self.started.append(stage)

    def update(self, done: int, *, total: int | None = None, **metrics: float) -> None:
        self.done[self.started[-1]] = done

    def line(self, text: str) -> None:
        self.lines.append(text)

    def forget(self, stage: str, from_step: int) -> None:
        assert from_step == 0

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.steps.setdefault(stage, []).append(step)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("runs")
    config = load_config(PROJECT / "configs" / "quickstart.yaml", [f"run.root={root}", *SMALL])
    assert config.cohort is not None
    write_cohort(config.cohort, Path(config.data.root), lambda done, total: None)
    return config


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def trained(config: Config) -> dict[str, Any]:
    """Both stages, one after the other, and what the reporter was told."""
    with pytest.raises(StageError, match="run `medtvt-rl pretrain`"):
        sft.run(config, Said())
    said = Said()
    found: dict[str, Any] = {"said": said, "pretrain": pretrain.run(config, said)}
    write_json(config.stage_folder("pretrain") / "finished.json", {})
    found["sft"] = sft.run(config, said)
    for stage in (pretrain, sft):
        stage.finished(config)
    return found


def test_a_place_that_is_lost_before_ray_train_takes_it_is_told(
    config: Config, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Bundle(role="learner", index=0, cpus=9, gpus=0, labels={})
    monkeypatch.setattr(supervised, "_placeable", lambda *_: gone)
    hasty = dataclasses.replace(config, placement=dataclasses.replace(config.placement, timeout_s=1.0))
    expected = r"pretrain: the place of its 2 workers \(9 CPU each\) was lost .* in 1 s .* The cluster has .*3 CPU"
    with pytest.raises(StageError, match=expected):
        supervised.train(hasty, "pretrain", config.stage_folder("pretrain") / "start", False, Said())


def test_each_stage_reports_while_it_runs(trained: dict[str, Any]) -> None:
    said = trained["said"]
    assert said.started == ["store", "encoders", "pretrain", "sft"]
    assert said.done["encoders"] == 18
    for stage in ("pretrain", "sft"):
        steps = trained[stage]["summary"][stage]["steps"]
        assert said.done[stage] == steps and said.steps[stage] == list(range(1, steps + 1))
    assert sum("sft: epoch" in line for line in said.lines) == 2


def test_the_summary_says_what_was_kept(trained: dict[str, Any]) -> None:
    first, second = trained["pretrain"]["summary"]["pretrain"], trained["sft"]["summary"]["sft"]
    assert 0 < first["validation"]["validation_loss"] < 8 and first["encoder_auc"]
    assert {"total", "reward/jaccard", "reward/format", "validation_loss"} <= set(second["validation"])
    assert second["epochs"] == 2 and second["encoder_auc"] == {}


def test_the_folders_are_whole_and_differ_where_training_was(trained: dict[str, Any], config: Config) -> None:
    folders = {stage: config.stage_folder(stage) / "model" for stage in ("pretrain", "sft")}
    weights = {stage: dict(named_weights(load_policy(folder))) for stage, folder in folders.items()}
    start = dict(named_weights(load_policy(config.stage_folder("pretrain") / "start")))
    encoder = "study_tower.ecg_encoder.blocks.0.0.weight"
    assert not torch.equal(start[encoder], weights["pretrain"][encoder])
    frozen = [name for name in start if "_encoder." in name]
    assert all(torch.equal(weights["pretrain"][name], weights["sft"][name]) for name in frozen)
    embedding = "language_model.model.embed_tokens.weight"
    assert not torch.equal(weights["pretrain"][embedding], weights["sft"][embedding])
    for folder in folders.values():
        kept = json.loads((folder / "config.json").read_text())
        # What `diagnose` goes by.
        assert (kept["film_crop"], kept["max_answer_tokens"]) == ("center", 96)
        assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
        assert not folder.with_name("checkpoint").exists()


def test_a_failing_worker_is_named_with_its_cause(config: Config, trained: dict[str, Any]) -> None:
    config.sft.batch_size = 3
    with pytest.raises(StageError, match=r"sft: worker [01] of 2 failed: .*batch_size: got 3"):
        sft.run(config, Said())
    assert (config.stage_folder("sft") / "model" / "config.json").is_file()
