"""From the answers of both policies to the summary of the evaluation; and the answers' file.

Owns: what is compared with what, and the file, so that a finished evaluation can be judged anew without an engine. Does
not own: asking (answers.py, evaluate.py), the metrics (medtvt_rl/evaluation).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from medtvt_rl.config import Config
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.user_code import Guarded
from pipelines.answers import Evaluator
from pipelines.json_lines import read_rows

ANSWERS_FILE = "answers.jsonl"
POLICIES = ("sft", "grpo")
Answers = Mapping[str, StudyAnswers]
OnStart = Callable[[str, int, str], None]
OnProgress = Callable[[int], None]


@runtime_checkable
class ComparesTexts(Protocol):
    """An evaluator that also compares answers with reference answers, as texts."""

    def compare_texts(self, answers: Answers, on_progress: OnProgress) -> Any:
        """A result with `to_dict()` of metrics by name, and `notes` of what is missing."""


def save_answers(config: Config, answers: Mapping[str, Answers]) -> None:
    """Writes the answers of each policy to the stage's folder; the file appears whole or not at all."""
    path = answers_file(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for policy, given in answers.items():
            for prompt_id, one in given.items():
                row = {"policy": policy, "prompt_id": prompt_id, "greedy": one.greedy, "sampled": list(one.sampled)}
                file.write(json.dumps(row) + "\n")
    os.replace(temporary, path)


def saved_answers(config: Config) -> dict[str, dict[str, StudyAnswers]]:
    """What `save_answers` wrote; empty where there is no file."""
    found: dict[str, dict[str, StudyAnswers]] = {}
    for row in read_rows(answers_file(config)):
        one = StudyAnswers(sampled=tuple(row["sampled"]), greedy=row["greedy"])
        found.setdefault(row["policy"], {})[row["prompt_id"]] = one
    return found


def answers_file(config: Config) -> Path:
    return config.stage_folder("evaluate") / ANSWERS_FILE


def judged(
    config: Config, evaluator: Evaluator, answers: Mapping[str, Answers], start: OnStart, progress: OnProgress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluation's part of the summary, without ablations, and the result of each policy.

    Args:
        answers: of each of POLICIES, to the same prompts.
        start, progress: told of what takes long, as a Reporter's.
    """
    results = {policy: evaluator.evaluate(answers[policy]) for policy in POLICIES}
    summary: dict[str, Any] = {policy: summarise(results[policy]) for policy in POLICIES}
    summary["gain"] = evaluator.paired_gain(results["sft"], results["grpo"]).to_dict()
    summary["metrics"] = config.evaluation.metrics
    if config.evaluation.metrics == "paper":
        summary["notes"] = _add_texts(config, summary, evaluator, answers, start, progress)
    return summary, results


def _add_texts(
    config: Config,
    summary: dict[str, Any],
    evaluator: Evaluator,
    answers: Mapping[str, Answers],
    start: OnStart,
    progress: OnProgress,
) -> dict[str, str]:
    """Adds the comparison of texts to the `paper` block of each policy; returns what is missing."""
    if not isinstance(evaluator, ComparesTexts):
        name = config.task.evaluate if isinstance(evaluator, Guarded) else type(evaluator).__name__
        return {"paper": f"{name}, the evaluator of this task, does not compute the published metrics"}
    notes: dict[str, str] = {}
    for policy, words in zip(POLICIES, ("before", "after")):

        def told(done: int, words: str = words, total: int = len(answers[policy])) -> None:
            if done == 0:
                start(f"texts {words} GRPO", total, "prompt")
            progress(done)

        result = evaluator.compare_texts(answers[policy], told)
        summary[policy].setdefault("paper", {}).update(result.to_dict())
        notes |= result.notes
    return notes


def summarise(result: Any) -> dict[str, Any]:
    """The metrics by name, beside what else the result tells."""
    found = result.to_dict()
    return {**found.pop("metrics"), **found}


def same_prompts(answers: Mapping[str, Answers]) -> bool:
    """Whether each policy has answered, and both the same prompts."""
    asked: Sequence[set[str]] = [set(answers.get(policy, {})) for policy in POLICIES]
    return bool(asked[0]) and asked[0] == asked[1]
