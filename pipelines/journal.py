"""The journal: every group that was trained on, with its step, versions and rewards, one JSON line each.

Owns: journal/groups.jsonl, the steps with the checksums of their weights (journal/steps.jsonl), the groups that were
given up (journal/discarded.jsonl), the actors that were lost (journal/events.jsonl), and the sample of completions that
the report shows (journal/samples.jsonl); that all of it which a run makes again is forgotten first.
Does not own: the learners' inputs (journal/steps/, medtvt_rl/learner/step_record.py), which the learners write, or the
settings that steps were learnt with (journal/settings/, step_settings.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ray
from transformers import PreTrainedTokenizerBase

from medtvt_rl.faults import Incident
from medtvt_rl.learner.step_record import NONFINITE_FOLDER, STEPS_FOLDER
from medtvt_rl.types import Completion
from pipelines.grpo_roles import TrainedStep, TrainingGroup
from pipelines.json_lines import keep_rows, read_rows, sync
from pipelines.step_settings import SETTINGS_FOLDER, keep_settings

FILES = ("groups", "steps", "discarded", "samples", "events")
SAMPLE_EVERY_STEPS = 10
FETCH_TIMEOUT_S = 60.0
STEPS_FILE = "steps.jsonl"


def fetch(payload: Any) -> Any:
    """What is behind a handle of the loop: a RolloutGroup, or its reference log-probs."""
    return ray.get(payload, timeout=FETCH_TIMEOUT_S)


class Journal:
    """Appends to the run folder; context manager.

    Args:
        fetch: from the payload of a finished group to the group; called for the few whose text is written.
        first_step: where the run goes on; what the journal holds of this and later steps is forgotten.
        is_known: whether a group that was given up stays so; None: none was, the run starts anew.
        with_texts: whether the samples hold texts, as the report then shows them; else their rewards alone.
        settings: the resolved configuration, as YAML, that the steps from `first_step` on are learnt with.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        fetch: Callable[[Any], Any] = fetch,
        first_step: int = 0,
        is_known: Callable[[int], bool] | None = None,
        with_texts: bool = True,
        settings: str | None = None,
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._fetch = fetch
        self._first_step, self._is_known = first_step, is_known
        self._with_texts, self._settings = with_texts, settings
        self._files: dict[str, IO[str]] = {}

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)  # ids and texts of patients
        for name in FILES:
            path = self._folder / f"{name}.jsonl"
            keep_rows(path, self._is_kept)
            self._files[name] = path.open("a", encoding="utf-8")
        for name in (STEPS_FOLDER, NONFINITE_FOLDER, SETTINGS_FOLDER):
            _forget_files(self._folder / name, self._first_step)
        if self._settings is not None:
            keep_settings(self._folder, self._first_step, self._settings)
        return self

    def _is_kept(self, row: dict[str, Any]) -> bool:
        if "step" in row:
            return int(row["step"]) < self._first_step
        if self._is_known is None:
            return False
        return "group_id" not in row or self._is_known(int(row["group_id"]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def write(self, trained: TrainedStep) -> None:
        """One step: a line for it and for each of its groups, and now and then the text of one group."""
        lines = (
            {**_group_line(trained.step, group), "failed_texts": self._failed_texts(group)} for group in trained.groups
        )
        self._append("groups", *lines)
        self._append("steps", _step_line(trained))
        if trained.step % SAMPLE_EVERY_STEPS == 0:
            self._append("samples", self._sample_line(trained.step, trained.groups[0]))

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """One group that was given up, and why."""
        self._append("discarded", {"group_id": group_id, "prompt_id": prompt_id, "reason": reason})

    def incident(self, incident: Incident) -> None:
        """One actor that was lost, and what became of it."""
        told = {name: value for name, value in asdict(incident).items() if not name.startswith("log")}
        self._append("events", {"time": round(time.time(), 3), **told})

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
        if not self._with_texts:
            return {"step": step, "prompt_id": group.group.header.prompt_id, "completions": _rewards(group)}
        payload = self._fetch(group.group.payload)
        return {
            "step": step,
            "prompt_id": payload.prompt.prompt_id,
            "ground_truth": payload.prompt.ground_truth,
            "completions": [
                {"text": self._text(c), **rewards} for c, rewards in zip(payload.completions, _rewards(group))
            ],
        }

    def _append(self, name: str, *rows: dict[str, Any]) -> None:
        file = self._files[name]
        file.writelines(json.dumps(row) + "\n" for row in rows)
        sync(file)  # a checkpoint, which is synced, must not know of steps that the journal does not


def _forget_files(folder: Path, first_step: int) -> None:
    """Removes the files, named by their step, of this and later steps, whatever rank wrote them; and what a crash left
    half written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        step = re.match(r"\d+", path.name)
        if path.name.endswith(".tmp") or (step is not None and int(step[0]) >= first_step):
            path.unlink()


def _rewards(group: TrainingGroup) -> list[dict[str, Any]]:
    """Of each completion: the total, and what it is made of."""
    rewards = group.group.rewards
    return [
        {"reward": float(total), "components": {name: float(of[place]) for name, of in rewards.components.items()}}
        for place, total in enumerate(rewards.total)
    ]


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of steps.jsonl in a journal's folder. Raises ValueError if there is none."""
    path = folder / STEPS_FILE
    if not path.is_file():
        raise ValueError(f"journal: there is no {path}; name the folder of a run whose grpo stage has begun")
    return read_rows(path)


def _step_line(trained: TrainedStep) -> dict[str, Any]:
    return {
        "step": trained.step,
        "learning_rate": trained.learning_rate,
        "skipped": trained.metrics["updates"] == 0,
        "group_ids": [group.group_id for group in trained.groups],
        "checksum": trained.checksum,
    }


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
