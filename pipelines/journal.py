"""The journal: every group that was trained on, with its step, versions and rewards, one JSON line each.

Owns: journal/groups.jsonl, the groups that were given up (journal/discarded.jsonl), and the sample of completions that
the report shows (journal/samples.jsonl).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ray
from transformers import PreTrainedTokenizerBase

from medtvt_rl.types import Completion, RolloutGroup
from pipelines.grpo_loop import TrainingGroup

SAMPLE_EVERY_STEPS = 10
FETCH_TIMEOUT_S = 60.0


def fetch_group(payload: Any) -> RolloutGroup:
    """The group behind a handle of the loop."""
    group: RolloutGroup = ray.get(payload, timeout=FETCH_TIMEOUT_S)
    return group


class Journal:
    """Appends to the run folder; context manager.

    Args:
        fetch: from the payload of a finished group to the group; called for the few whose text is written.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        fetch: Callable[[Any], RolloutGroup] = fetch_group,
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._fetch = fetch
        self._groups: IO[str] | None = None
        self._discarded: IO[str] | None = None
        self._samples: IO[str] | None = None

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._groups = (self._folder / "groups.jsonl").open("w", encoding="utf-8")
        self._discarded = (self._folder / "discarded.jsonl").open("w", encoding="utf-8")
        self._samples = (self._folder / "samples.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._groups, self._discarded, self._samples):
            if file is not None:
                file.close()

    def write(self, step: int, groups: list[TrainingGroup]) -> None:
        """One step: a line per group, and now and then the text of one group."""
        for group in groups:
            self._append(self._groups, {**_group_line(step, group), "failed_texts": self._failed_texts(group)})
        if step % SAMPLE_EVERY_STEPS == 0:
            self._append(self._samples, self._sample_line(step, groups[0]))

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """One group that was given up, and why."""
        self._append(self._discarded, {"group_id": group_id, "prompt_id": prompt_id, "reason": reason})

    def _failed_texts(self, group: TrainingGroup) -> dict[str, str]:
        """Completion id -> text, of those that a reward function could not score."""
        if not group.group.rewards.failed.any():
            return {}
        payload = self._fetch(group.group.payload)
        failed = zip(payload.completions, group.group.rewards.failed)
        return {c.completion_id: self._text(c) for c, has_failed in failed if has_failed}

    def _text(self, completion: Completion) -> str:
        return str(self._tokenizer.decode(completion.token_ids, skip_special_tokens=True))

    def _sample_line(self, step: int, group: TrainingGroup) -> dict[str, Any]:
        payload = self._fetch(group.group.payload)
        return {
            "step": step,
            "prompt_id": payload.prompt.prompt_id,
            "ground_truth": payload.prompt.ground_truth,
            "completions": [
                {"text": self._text(c), "reward": float(reward)}
                for c, reward in zip(payload.completions, group.group.rewards.total)
            ],
        }

    @staticmethod
    def _append(file: IO[str] | None, content: dict[str, Any]) -> None:
        assert file is not None, "the journal is open"
        file.write(json.dumps(content) + "\n")
        file.flush()


def _group_line(step: int, group: TrainingGroup) -> dict[str, Any]:
    header, rewards = group.group.header, group.group.rewards
    return {
        "step": step,
        "group_id": header.group_id,
        "prompt_id": header.prompt_id,
        "oldest_version": header.oldest_version,
        "newest_version": header.newest_version,
        "lengths": list(header.lengths),
        "rewards": {name: values.tolist() for name, values in rewards.components.items()},
        "failures": failures(group),
        "advantages": group.advantages.tolist(),
    }


def failures(group: TrainingGroup) -> dict[str, str]:
    """Completion id -> which reward function failed on it, and how."""
    reasons = enumerate(group.group.rewards.reasons)
    return {f"{group.group.header.group_id}/{index}": reason for index, reason in reasons if reason is not None}
