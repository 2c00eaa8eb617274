"""The journal: every group that was trained on, with its step, versions and rewards, one JSON line each.

Owns: journal/groups.jsonl and the sample of completions that the report shows (journal/samples.jsonl).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ray
from transformers import PreTrainedTokenizerBase

from medtvt_rl.types import RolloutGroup
from pipelines.grpo_loop import TrainingGroup

SAMPLE_EVERY_STEPS = 10
FETCH_TIMEOUT_S = 60.0


class Journal:
    """Appends to the run folder; context manager."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._groups: IO[str] | None = None
        self._samples: IO[str] | None = None

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._groups = (self._folder / "groups.jsonl").open("w", encoding="utf-8")
        self._samples = (self._folder / "samples.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._groups, self._samples):
            if file is not None:
                file.close()

    def write(self, step: int, groups: list[TrainingGroup]) -> None:
        """One step: a line per group, and now and then the text of one group."""
        for group in groups:
            self._append(self._groups, _group_line(step, group))
        if step % SAMPLE_EVERY_STEPS == 0:
            self._append(self._samples, self._sample_line(step, groups[0]))

    def _sample_line(self, step: int, group: TrainingGroup) -> dict[str, Any]:
        payload: RolloutGroup = ray.get(group.group.payload, timeout=FETCH_TIMEOUT_S)
        return {
            "step": step,
            "prompt_id": payload.prompt.prompt_id,
            "ground_truth": payload.prompt.ground_truth,
            "completions": [
                {"text": self._tokenizer.decode(c.token_ids, skip_special_tokens=True), "reward": float(reward)}
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
        "failures": {
            f"{header.group_id}/{index}": reason for index, reason in enumerate(rewards.reasons) if reason is not None
        },
        "advantages": group.advantages.tolist(),
    }
