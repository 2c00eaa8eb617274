"""A held-out measurement beside training: what the task's evaluator finds, and one that never ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.deadline import DeadlineError
from medtvt_rl.config import Config
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.types import Prompt
from pipelines import held_out
from pipelines.answers import Asker
from pipelines.held_out import HeldOutMeasurement


class Judge:
    """Finds the share of answered prompts, once it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()

    def evaluate(self, answers: Mapping[str, StudyAnswers]) -> Any:
        self.may_answer.wait(60)
        return SimpleNamespace(to_dict=lambda: {"metrics": {"answered": {"value": len(answers)}}})


def test_an_evaluator_is_waited_for_until_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge()

    async def answers(self: Asker, prompts: list[Prompt]) -> dict[str, StudyAnswers]:
        return {prompt.prompt_id: StudyAnswers(sampled=("a",), greedy="a") for prompt in prompts}

    monkeypatch.setattr(Asker, "answers", answers)
    monkeypatch.setattr(held_out, "make_evaluator", lambda *_: judge)
    config, nobody = Config(), SimpleNamespace(num_left=1)
    config.grpo.held_out.timeout_s = 0.05
    prompt = Prompt(prompt_id="p", token_ids=np.array([1], np.int32), item_id=None, ground_truth="")
    measurement = HeldOutMeasurement(config, nobody, nobody, [prompt])  # type: ignore[arg-type]
    with pytest.raises(DeadlineError, match=r"waited 0.05 s \(grpo.held_out.timeout_s\) for .* of task.evaluate"):
        asyncio.run(measurement.measure())
    judge.may_answer.set()
    assert asyncio.run(measurement.measure()) == {"answered": 1.0}
