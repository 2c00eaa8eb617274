"""What the journal holds of groups: trained, given up, and the text of what could not be scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_examples import watch_syncs

from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import Completion, GroupHeader, Prompt, RolloutGroup
from pipelines.grpo_roles import FinishedGroup, TrainedStep, TrainingGroup
from pipelines.journal import Journal, read_steps


class Tokenizer:
    """Words are numbers."""

    def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))


def rollout(group_id: int) -> RolloutGroup:
    prompt = Prompt(prompt_id=f"p{group_id}", token_ids=np.ones(3, np.int32), item_id=None, ground_truth="truth")
    completions = tuple(
        Completion(
            completion_id=f"{group_id}/{index}",
            token_ids=np.full(2, 10 * group_id + index, np.int32),
            behaviour_logprobs=np.zeros(2, np.float32),
            policy_versions=np.zeros(2, np.int32),
            finish_reason="stop",
        )
        for index in range(3)
    )
    return RolloutGroup(group_id=group_id, prompt=prompt, completions=completions)


def training_group(group_id: int, reasons: tuple[str | None, ...] = (None, None, None)) -> TrainingGroup:
    values = np.array([0.0, 1.0, 0.5], np.float32)
    failed = np.array([reason is not None for reason in reasons])
    group = FinishedGroup(
        header=GroupHeader.of(rollout(group_id), 0.1),
        payload=group_id,
        rewards=GroupRewards(components={"jaccard": values}, total=values, failed=failed, reasons=reasons),
        reference=None,
        reference_header=None,
    )
    return TrainingGroup(group=group, advantages=values)


def trained_step(step: int, *groups: TrainingGroup, **metrics: float) -> TrainedStep:
    return TrainedStep(step=step, groups=groups, learning_rate=0.5, checksum=77 + step, metrics=metrics)


def test_failed_completions_are_kept_with_their_text_and_only_they_are_fetched(tmp_path: Path) -> None:
    fetched: list[int] = []

    def fetch(payload: int) -> RolloutGroup:
        fetched.append(payload)
        return rollout(payload)

    with Journal(tmp_path, Tokenizer(), fetch) as journal:  # type: ignore[arg-type]
        journal.write(
            trained_step(1, training_group(4), training_group(5, (None, "jaccard: KeyError: 'x'", None)), updates=1)
        )
        journal.discarded(6, "p6", "ActorError: rollout 0\nend of its log")
    sound, failed = (json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines())
    assert fetched == [5]
    assert sound["failures"] == sound["failed_texts"] == {}
    assert failed["failures"] == {"5/1": "jaccard: KeyError: 'x'"}
    assert failed["failed_texts"] == {"5/1": "51 51"}
    given_up = json.loads((tmp_path / "discarded.jsonl").read_text())
    assert given_up == {"group_id": 6, "prompt_id": "p6", "reason": "ActorError: rollout 0\nend of its log"}


def test_every_tenth_step_leaves_a_sample(tmp_path: Path) -> None:
    with Journal(tmp_path, Tokenizer(), rollout) as journal:  # type: ignore[arg-type]
        for step in range(11):
            journal.write(trained_step(step, training_group(step), updates=float(step != 3)))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 10]
    assert samples[1]["completions"][2] == {
        "text": "102 102",
        "reward": 0.5,
        "components": {"jaccard": 0.5},
    }
    steps = read_steps(tmp_path)
    assert steps[3] == {"step": 3, "learning_rate": 0.5, "skipped": True, "group_ids": [3], "checksum": 80}
    assert [line["skipped"] for line in steps].count(True) == 1


def test_a_run_that_goes_on_forgets_what_is_made_again(tmp_path: Path) -> None:
    def given_up(**resume: Any) -> list[int]:
        with Journal(tmp_path, Tokenizer(), rollout, **resume):  # type: ignore[arg-type]
            return [json.loads(line)["group_id"] for line in (tmp_path / "discarded.jsonl").read_text().splitlines()]

    with Journal(tmp_path, Tokenizer(), rollout) as journal:  # type: ignore[arg-type]
        for step in range(3):
            journal.write(trained_step(step, training_group(step), updates=1.0))
        for group_id in (4, 9, 12):
            journal.discarded(group_id, f"p{group_id}", "it died")
    assert given_up(first_step=2, is_known=lambda group_id: group_id not in (9, 12)) == [4]
    assert [row["step"] for row in read_steps(tmp_path)] == [0, 1]
    assert given_up() == [] and read_steps(tmp_path) == []


def test_what_the_learners_kept_of_steps_that_are_made_again_goes_whatever_rank_wrote_it(tmp_path: Path) -> None:
    names = ("000001_0.npz", "000002_0.npz", "000002_1.npz", "1000000_0.npz", ".000001_0.npz.tmp", "notes")
    for folder in ("steps", "nonfinite"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()

    def left(first_step: int) -> set[str]:
        with Journal(tmp_path, Tokenizer(), rollout, first_step, settings=f"{first_step}"):  # type: ignore[arg-type]
            return {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}

    assert left(2) == {"steps/000001_0.npz", "steps/notes", "nonfinite/000001_0.npz", "nonfinite/notes"} | {
        "settings/000002.yaml"
    }
    assert left(0) == {"steps/notes", "nonfinite/notes", "settings/000000.yaml"}


def test_what_is_told_of_a_step_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = watch_syncs(monkeypatch)
    with Journal(tmp_path, Tokenizer(), rollout, settings="a: b") as journal:  # type: ignore[arg-type]
        journal.write(trained_step(0, training_group(0), updates=1.0))
        journal.write(trained_step(1, training_group(1), updates=1.0))
        journal.discarded(2, "p2", "it died")
        for name in ("groups", "steps", "samples", "discarded"):
            assert synced[f"{name}.jsonl"] == (tmp_path / f"{name}.jsonl").stat().st_size > 0, name
    assert synced["000000.yaml.tmp"] > 0
    with Journal(tmp_path, Tokenizer(), rollout, 1):  # type: ignore[arg-type]
        assert synced[".steps.jsonl.tmp"] == (tmp_path / "steps.jsonl").stat().st_size > 0
