"""Whether an interrupted supervised stage goes on, what is told of it, and how a signal ends one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest

from medtvt_rl.config import Config, load_config
from medtvt_rl.learner.supervised import Progress
from pipelines import sft, supervised
from pipelines.resume import ResumeError
from pipelines.stage_resume import checkpoints_of, facts_of, find_epoch, where_it_goes_on
from pipelines.stopping import SIGNALS, Stopped, stop_at_once

TEXT_TASK = str(Path(__file__).parents[2] / "configs" / "text_task.yaml")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """The model that the stage starts from."""
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def a_config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(TEXT_TASK, [f"run.root={tmp_path}", *overrides])


def leave(config: Config, start: Path, epochs: int) -> None:
    """A checkpoint after so many epochs, none of which was measured."""
    checkpoints, facts = checkpoints_of(config, "sft"), facts_of(config, start)
    folder = checkpoints.begin(epochs)
    for name in ("rank_00000.safetensors", "rest.safetensors"):
        (folder / name).write_bytes(b"state")
    content = {**facts, "identity": {**facts["identity"], "examples": "e1"}, "encoder_auc": {}}
    checkpoints.complete(Progress(epochs=epochs, steps=epochs * 10), 1, content)


def found(tmp_path: Path, start: Path, *overrides: str, examples: str = "e1") -> list[str]:
    """What is told of going on after two epochs with these settings."""
    leave(a_config(tmp_path), start, 2)
    config, said = a_config(tmp_path, *overrides), list[str]()
    checkpoint = find_epoch(config, "sft", facts_of(config, start)["identity"], lambda: examples, said.append)
    assert checkpoint is not None and checkpoint.progress == Progress(epochs=2, steps=20)
    return said


def test_it_goes_on_after_the_last_epoch_and_tells_what_differs(tmp_path: Path, start: Path) -> None:
    assert found(tmp_path, start) == ["sft: goes on after epoch 2 of 8"]
    others = ["sft.num_workers=1", "sft.timeout_s=60", "learner.token_budget=512", "grpo.steps=7"]
    assert found(tmp_path, start, *others) == [
        "sft: goes on after epoch 2 of 8, with learner.token_budget: 8192 then, 512 now; "
        "sft.num_workers: 2 then, 1 now; sft.timeout_s: 3600.0 then, 60.0 now"
    ]


@pytest.mark.parametrize(
    "override", ["run.seed=7", "sft.learning_rate=1e-4", "sft.batch_size=32", "sft.epochs=9", "model.lora.rank=4"]
)
def test_settings_that_shape_it_are_refused(tmp_path: Path, start: Path, override: str) -> None:
    with pytest.raises(ResumeError, match=rf"{override.split('=')[0]}: .* then, .* now.*resume=never"):
        found(tmp_path, start, override)


def test_other_examples_and_another_model_are_refused(tmp_path: Path, start: Path) -> None:
    with pytest.raises(ResumeError, match=r"the examples that the data and the tokenizer give changed since then"):
        found(tmp_path, start, examples="e2")
    leave(a_config(tmp_path), start, 2)
    (start / "model.safetensors").write_bytes(b"other")
    config = a_config(tmp_path)
    identity = facts_of(config, start)["identity"]
    with pytest.raises(ResumeError, match=r"the model or tokenizer that the run started from changed since then"):
        find_epoch(config, "sft", identity, lambda: "e1", lambda text: None)


def test_it_starts_anew_where_there_is_none_or_it_is_told_to_and_not_where_one_is_damaged(
    tmp_path: Path, start: Path
) -> None:
    config, said = a_config(tmp_path), list[str]()
    identity = facts_of(config, start)["identity"]
    assert find_epoch(config, "sft", identity, lambda: pytest.fail("not asked"), said.append) is None and not said
    leave(config, start, 2)
    never = a_config(tmp_path, "resume=never")
    assert find_epoch(never, "sft", identity, lambda: "e1", said.append) is None and not said
    place = checkpoints_of(config, "sft").folder / "epoch_000002"
    (place / "rank_00000.safetensors").write_bytes(b"stale")
    with pytest.raises(ResumeError, match=r"no checkpoint in \S+ can be read, 1 lie there.*resume=never"):
        find_epoch(config, "sft", identity, lambda: "e1", said.append)
    wrong = "rank_00000.safetensors is not what was written (size or SHA-256 differ)"
    assert said == [f"sft: checkpoint {place} is damaged and passed over: {wrong}"]


def test_a_finished_stage_keeps_none(tmp_path: Path, start: Path) -> None:
    config = a_config(tmp_path)
    leave(config, start, 2)
    sft.finished(config)
    assert checkpoints_of(config, "sft").epochs == [] and not checkpoints_of(config, "sft").folder.exists()


class Said:
    """A reporter that remembers what it forgot."""

    def __init__(self) -> None:
        self.forgotten: list[tuple[str, int]] = []

    def line(self, text: str) -> None:
        pass

    def forget(self, stage: str, from_step: int) -> None:
        self.forgotten.append((stage, from_step))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_says_where_the_same_command_goes_on(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fit(*_: Any) -> NoReturn:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(supervised, "_fit", fit)
    monkeypatch.setattr(supervised, "_placeable", lambda *_: None)
    monkeypatch.setattr(supervised, "_examples_checksum", lambda *_: "e1")
    config, reporter, name = a_config(tmp_path), Said(), signal.Signals(number).name
    before = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        for each, words in {
            0: "no epoch of sft was finished; the same command begins it anew",
            3: "the same command goes on after epoch 3 of 8 of sft",
        }.items():
            if each:
                leave(config, start, each)
            stop_at_once()
            with pytest.raises(Stopped, match=f"^{name}: {words}$") as stopped:
                supervised.train(config, "sft", start, False, reporter)  # type: ignore[arg-type]
            assert stopped.value.exit_code == 128 + number
        never = a_config(tmp_path, "resume=never")
        assert where_it_goes_on(never, "sft") == "the same command with resume=auto goes on after epoch 3 of 8 of sft"
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert reporter.forgotten == [("sft", 0), ("sft", 31)], "the rows of what is made again"
