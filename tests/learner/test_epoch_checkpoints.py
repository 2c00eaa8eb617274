"""Checkpoints of a supervised stage: bit for bit what was written, complete or not there, and none that costs a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_supervised import Seen, Source, _examples
from tiny_policy import PlainEngine, TinyItems, TinyPolicy
from torch import Tensor

from medtvt_rl.learner.config import SupervisedConfig
from medtvt_rl.learner.epoch_checkpoints import EpochCheckpoints, EpochKeeper
from medtvt_rl.learner.supervised import Progress, SupervisedResult, SupervisedTrainer, Validation
from medtvt_rl.learner.validation import HeldOutLoss
from medtvt_rl.model.seal import seal

torch.set_num_threads(1)
CONTENT = {"encoder_auc": {"auc/a": 0.5}, "settings": {}, "packages": {}, "identity": {"model": "abc"}}


class RestlessPolicy(TinyPolicy):
    """With dropout, and with a buffer that training changes and answers depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def hidden_states(self, *args: Any, **options: Any) -> Tensor:
        hidden = super().hidden_states(*args, **options)
        if self.training:
            self.seen *= 1.001
            hidden = torch.nn.functional.dropout(hidden, 0.1)
        return hidden * self.seen


class Killed(Exception):
    """Stands for the end of the process."""


class Stage:
    """A stage of four epochs of three steps, in a folder, as a process of its own would run it."""

    def __init__(self, folder: Path, scores: tuple[float, ...] = (), dies_after: int = 0, **settings: Any) -> None:
        self.checkpoints = EpochCheckpoints(folder / "checkpoint", folder / "model")
        self.policy, self.seen, self.said = RestlessPolicy(), Seen(), list[str]()
        self._scores, self._dies_after = scores, dies_after
        self._settings = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-2, **settings}

    def run(self) -> SupervisedResult:
        found = self.checkpoints.newest(self.said.append)
        if found is None:
            self.checkpoints.clear()
        else:
            found.restore_rest(self.policy)
        engine = PlainEngine(self.policy)
        self._keeper = EpochKeeper(self.checkpoints, engine, False, CONTENT, self.said.append)
        self._held_out = HeldOutLoss(engine, TinyItems(), _examples(), 1000)
        self._epoch = 0 if found is None else found.progress.epochs
        trainer = SupervisedTrainer(
            engine,
            TinyItems(),
            Source(),
            SupervisedConfig(**self._settings),
            seed=1,
            token_budget=1000,
            validate=self._validate,
            keep_best=self._keep_best,
            keep=self._keep,
            observer=self,
        )
        if found is not None:
            engine.load(Path(found.place))
        return trainer.run(None if found is None else found.progress)

    def step(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        self.seen.steps.append(metrics)

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.seen.epochs.append(metrics)

    def _validate(self) -> Validation:
        loss = self._held_out()
        score = self._scores[self._epoch] if self._scores else -loss
        return Validation(score=score, metrics={"validation_loss": loss})

    def _keep_best(self, epoch: int) -> None:
        folder = self.checkpoints.best(epoch)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        save_file(
            {name: tensor.clone() for name, tensor in self.policy.state_dict().items()}, folder / "model.safetensors"
        )
        seal(folder)

    def _keep(self, progress: Progress) -> None:
        self._epoch = progress.epochs
        self._keeper.keep(progress)
        if progress.epochs == self._dies_after:
            raise Killed


def killed(folder: Path, after: int, **settings: Any) -> Stage:
    """A stage that ended with the checkpoint after so many epochs."""
    stage = Stage(folder, dies_after=after, **settings)
    with pytest.raises(Killed):
        stage.run()
    return stage


@pytest.mark.parametrize("patience", [0, 1])
def test_a_stage_that_dies_after_every_epoch_ends_in_the_same_weights_and_words(tmp_path: Path, patience: int) -> None:
    scores = (0.1, 0.5, 0.4, 0.6)
    settings: dict[str, Any] = {"scores": scores, "patience": patience}
    whole = Stage(tmp_path / "whole", **settings)
    expected = whole.run()
    told = []
    for epochs in range(1, expected.epochs + 1):
        told += killed(tmp_path / "struck", epochs, **settings).seen.epochs
    last = Stage(tmp_path / "struck", **settings)
    found = last.run()
    assert (found.epochs, found.steps, found.best_epoch) == (expected.epochs, expected.steps, expected.best_epoch)
    assert found.validation == expected.validation and told == whole.seen.epochs
    assert last.said == [] and last.seen.steps == [] and found.epochs == (3 if patience else 4)
    for (name, tensor), other in zip(whole.policy.state_dict().items(), last.policy.state_dict().values()):
        assert torch.equal(tensor, other), name
    best = f"best_{expected.best_epoch:06d}"
    for stage in (whole, last):
        assert {path.name for path in stage.checkpoints.folder.iterdir()} == {f"epoch_{found.epochs:06d}", best}
    weights = [(stage.checkpoints.folder / best / "model.safetensors").read_bytes() for stage in (whole, last)]
    assert weights[0] == weights[1]


def test_what_a_checkpoint_says_comes_back(tmp_path: Path) -> None:
    found = killed(tmp_path, 1).checkpoints.newest(lambda text: pytest.fail(text))
    assert found is not None and found.encoder_auc == {"auc/a": 0.5} and found.identity == {"model": "abc"}
    assert (found.progress.epochs, found.progress.steps, found.progress.best_epoch) == (1, 3, 0)
    early = killed(tmp_path / "early", 1, validate_from=3).checkpoints.newest(lambda text: pytest.fail(text))
    assert early is not None and early.progress.best == -float("inf") and early.progress.best_epoch == -1


def test_encoders_that_were_warmed_up_and_frozen_come_back(tmp_path: Path) -> None:
    def policy() -> TinyPolicy:
        found = TinyPolicy()
        found.study_tower = torch.nn.Linear(2, 2).requires_grad_(False)
        return found

    warm, checkpoints = policy(), EpochCheckpoints(tmp_path / "checkpoint", tmp_path / "model")
    warm.study_tower.weight += 1
    EpochKeeper(checkpoints, PlainEngine(warm), True, CONTENT, pytest.fail).keep(Progress(epochs=1))
    found, fresh = checkpoints.newest(pytest.fail), policy()
    assert found is not None and not torch.equal(fresh.study_tower.weight, warm.study_tower.weight)
    found.restore_rest(fresh)
    assert torch.equal(fresh.study_tower.weight, warm.study_tower.weight)


@pytest.mark.parametrize(
    "damage", ["rank_00000.safetensors", "rest.safetensors", "manifest.json", "best", "no best", "cut"]
)
def test_a_damaged_one_is_passed_over_with_a_line(tmp_path: Path, damage: str) -> None:
    checkpoints = killed(tmp_path, 2).checkpoints
    folder, best = checkpoints.folder / "epoch_000002", next(checkpoints.folder.glob("best_*"))
    if damage == "no best":
        best.rename(best.with_name("elsewhere"))
    elif damage == "cut":
        (folder / "manifest.json").unlink()
    else:
        path = best / "model.safetensors" if damage == "best" else folder / damage
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    said = list[str]()
    assert checkpoints.newest(said.append) is None
    assert len(said) == 1 and f"{folder} is damaged and passed over: " in said[0] and "\n" not in said[0]
    again = Stage(tmp_path)
    assert again.run().epochs == 4 and len(again.seen.epochs) == 4, "it begins anew"


def test_one_that_was_cut_short_while_being_written_is_none(tmp_path: Path) -> None:
    checkpoints = killed(tmp_path, 1).checkpoints
    (checkpoints.begin(2) / "rank_00000.safetensors").write_bytes(b"half")
    found = checkpoints.newest(lambda text: pytest.fail(text))
    assert found is not None and found.progress.epochs == 1 and checkpoints.epochs == [1]


def test_a_best_policy_that_was_moved_to_its_place_already_is_found_there(tmp_path: Path) -> None:
    """The process ended between that and the mark of the finished stage."""
    checkpoints = killed(tmp_path, 4).checkpoints
    next(checkpoints.folder.glob("best_*")).rename(checkpoints.output)
    assert Stage(tmp_path).run().epochs == 4
    (checkpoints.output / "checksums.json").write_text(json.dumps({}))
    said = list[str]()
    assert checkpoints.newest(said.append) is None and len(said) == 1, "another model lies there"


def test_one_that_cannot_be_written_is_told_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, 1)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("medtvt_rl.learner.epoch_checkpoints.save_file", full)
    stage = Stage(tmp_path)
    assert stage.run().epochs == 4 and stage.checkpoints.epochs == [1]
    assert len(stage.said) == 3 and "the checkpoint after epoch 2 could not be written ([Errno 28]" in stage.said[0]
    assert not list(stage.checkpoints.folder.glob(".*"))
