"""Held-out evaluation of a task that names no evaluator: the mean reward, with intervals over prompts.

Owns: the total reward of each prompt's answers, and its mean. Does not own: the reward functions (rewards/scorer.py),
generation, the bootstrap. The interface is that of `DiagnosisEvaluator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medtvt_rl.config import Config
from medtvt_rl.evaluation.bootstrap import (
    Interval,
    Measure,
    bootstrap_measures,
    bootstrap_paired_difference,
    mean_measure,
)
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.privacy import hashed
from medtvt_rl.rewards.scorer import Scorer
from medtvt_rl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """Mean rewards of one policy on one set of prompts.

    Attributes:
        prompt_ids: [n].
        metrics: reward (of sampled answers, where there are any) and reward_greedy -> interval over prompts.
        measures: name -> what the metric is computed from, for paired differences.
    """

    prompt_ids: tuple[str, ...]
    metrics: dict[str, Interval]
    measures: dict[str, Measure] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the values of single prompts."""
        metrics = {name: interval.to_dict() for name, interval in self.metrics.items()}
        return {"num_prompts": len(self.prompt_ids), "metrics": metrics}


class RewardEvaluator:
    """Scores answers with the run's reward functions.

    Args:
        config: of the run; its `rewards` are what is computed.
        prompts: those that may be answered; their ground truths and evidence are what answers are compared with.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt]) -> None:
        self._scorer = Scorer(config.rewards)
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self._resamples = config.evaluation.bootstrap_resamples
        self._seed = config.run.seed

    def evaluate(self, answers: Mapping[str, StudyAnswers]) -> RewardResult:
        """Mean total reward over the answered prompts: of each prompt's sampled answers, and of its greedy one.

        Args:
            answers: by prompt id.

        Raises:
            ValueError: no answers, or one for an unknown prompt.
        """
        unknown = sorted(set(answers).difference(self._prompts))
        if unknown or not answers:
            what = f"{len(unknown)} are of unknown prompts, e.g. {hashed(unknown[0])}" if unknown else "none"
            raise ValueError(f"answers: {what}; expected one for each prompt of the split")
        prompt_ids = tuple(prompt_id for prompt_id in self._prompts if prompt_id in answers)
        measures = {"reward_greedy": self._mean({i: (answers[i].greedy,) for i in prompt_ids})}
        if all(answers[i].sampled for i in prompt_ids):
            measures["reward"] = self._mean({i: answers[i].sampled for i in prompt_ids})
        return RewardResult(
            prompt_ids=prompt_ids,
            metrics=bootstrap_measures(measures, self._resamples, self._seed),
            measures=measures,
        )

    def paired_gain(self, before: RewardResult, after: RewardResult, metric: str = "reward") -> Interval:
        """metric(after) - metric(before), paired over prompts. Raises ValueError if they are not over the same ones."""
        if before.prompt_ids != after.prompt_ids:
            raise ValueError(
                f"paired gain of {metric}: {len(before.prompt_ids)} prompts before, {len(after.prompt_ids)} after, "
                "not the same ones; evaluate both on the same prompts"
            )
        return bootstrap_paired_difference(before.measures[metric], after.measures[metric], self._resamples, self._seed)

    def _mean(self, texts: Mapping[str, tuple[str, ...]]) -> Measure:
        """The mean over prompts of the mean over each one's texts."""
        prompts = ((self._prompts[prompt_id], some) for prompt_id, some in texts.items())
        return mean_measure(
            [np.mean(self._scorer.score(some, p.ground_truth, p.evidence).total) for p, some in prompts]
        )
