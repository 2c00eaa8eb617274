"""Held-out measurement beside training: the same engines answer, the task's own evaluator judges.

Owns: the prompts and the names of what is measured. Does not own: when it happens (grpo_loop.py). Engines may take new
weights while they answer; a measurement then is of the policy that moved on, by a step or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from actors.deadline import within
from actors.own_thread import in_own_thread
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.types import Prompt
from pipelines.answers import Asker, make_evaluator, one_per_item

# Points are read off, no intervals: the fewest resamples that the evaluators take.
RESAMPLES = 2


class HeldOutMeasurement:
    """Asks the first `grpo.held_out.max_prompts` prompts of a split, one sampled and one greedy answer each.

    Args:
        prompts: of the split `grpo.held_out.split`, one or more.
    """

    def __init__(
        self, config: Config, pool: RolloutPool, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
    ) -> None:
        settings = config.grpo.held_out
        quick = replace(config, evaluation=replace(config.evaluation, bootstrap_resamples=RESAMPLES))
        self._prompts = one_per_item(prompts)[: settings.max_prompts]
        self._evaluator = make_evaluator(quick, self._prompts, settings.split)
        self._timeout_s = settings.timeout_s
        self._asker = Asker(config, pool, tokenizer, num_samples=1)

    async def measure(self) -> dict[str, float]:
        """The evaluator's metrics by name. Raises DeadlineError where it is late; its thread is left to itself."""
        answers = await self._asker.answers(self._prompts)
        judged = in_own_thread(self._evaluator.evaluate, answers)
        result = await within(judged, self._timeout_s, "the evaluator of task.evaluate", "grpo.held_out.timeout_s")
        metrics = result.to_dict()["metrics"]
        return {name: float(metric["value"]) for name, metric in metrics.items()}
