"""Held-out answers of the policy that the rollout generators hold, and who judges them.

Owns: which prompts count, how many are asked about at a time, the texts. Does not own: metrics (medtvt_rl/evaluation),
or when this happens: evaluate.py after training, held_out.py beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from actors.deadline import within
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.evaluation.bootstrap import Interval
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.evaluation.rewards import RewardEvaluator
from medtvt_rl.types import Prompt, RolloutGroup
from medtvt_rl.user_code import task_evaluator
from pipelines.stopping import cancelled

FIRST_GROUP_ID = 1 << 40


class Evaluator(Protocol):
    """What `task.evaluate` makes: answers in, a result with `to_dict() -> {"metrics": {name: interval}, ...}` out."""

    def evaluate(self, answers: Mapping[str, StudyAnswers]) -> Any:
        """The result of one policy; answers by prompt id."""

    def paired_gain(self, before: Any, after: Any, metric: str = ...) -> Interval:
        """The change of a metric between two results over the same prompts; of the main one if none is named."""


@runtime_checkable
class Ablating(Protocol):
    """An evaluator that also tells what the parts of an item are worth. A task without such parts leaves it out.

    Attributes:
        ablation_metric: of the greedy answers, what withholding a part is measured by.
    """

    ablation_metric: str

    def ablations(self, prompts: Sequence[Prompt]) -> Mapping[str, Sequence[Prompt]]:
        """Name of a part -> the same prompts, in the same order, whose items lack it."""


def make_evaluator(config: Config, prompts: Sequence[Prompt], split: str) -> Evaluator:
    """The task's evaluator of a split, or the mean reward where it names none."""
    evaluator: Evaluator = task_evaluator(config, split) or RewardEvaluator(config, prompts)
    return evaluator


def one_per_item(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each item: a study counts once, however often it is asked about. Prompts of plain text are
    all kept."""
    first = {prompt.prompt_id if prompt.item_id is None else prompt.item_id: prompt for prompt in reversed(prompts)}
    return [prompt for prompt in prompts if first[prompt.item_id or prompt.prompt_id] is prompt]


def prompts_at_once(config: Config, num_samples: int, num_generators: int) -> int:
    """How many prompts are asked about at a time: twice what fills the engines. The deadline of an answer runs while
    it waits for its engine, so that more would only queue towards it."""
    return max(1, 2 * config.rollout.engine.max_num_seqs // (num_samples + 1)) * num_generators


class Asker:
    """Collects answers, with the same seeds each time, so that policies differ and not their luck.

    Args:
        num_samples: answers sampled per prompt; one greedy answer is added.
    """

    def __init__(self, config: Config, pool: RolloutPool, tokenizer: PreTrainedTokenizerBase, num_samples: int) -> None:
        self._config, self._num_samples = config, num_samples
        self._limit = prompts_at_once(config, num_samples, max(1, pool.num_left))  # one that was lost comes back
        self._at_once = asyncio.Semaphore(self._limit)
        self._fetch_timeout_s = config.rollout.generate_timeout_s
        self._pool = pool
        self._tokenizer = tokenizer

    async def answers(
        self, prompts: Sequence[Prompt], sample: bool = True, on_answer: Callable[[int], None] | None = None
    ) -> dict[str, StudyAnswers]:
        """Sampled and greedy answers by prompt id; none is sampled with `sample=False`.

        Args:
            on_answer: told how many prompts are answered.
        """
        answered = 0

        async def ask(index: int, prompt: Prompt) -> tuple[str, StudyAnswers]:
            nonlocal answered
            group_id, sampled = FIRST_GROUP_ID + index, tuple[str, ...]()
            async with self._at_once:
                greedy = await self._texts(prompt, group_id, 1, greedy=True)
                if sample:
                    sampled = await self._texts(prompt, group_id, self._num_samples, greedy=False)
            answered += 1
            self._widen()
            if on_answer is not None:
                on_answer(answered)
            return prompt.prompt_id, StudyAnswers(sampled=sampled, greedy=greedy[0])

        tasks = [asyncio.create_task(ask(index, prompt)) for index, prompt in enumerate(prompts)]
        try:
            return dict(await asyncio.gather(*tasks))
        finally:
            await cancelled(tasks)  # where one fails, nobody waits for the others

    def _widen(self) -> None:
        """More prompts at a time where generators have joined."""
        limit = prompts_at_once(self._config, self._num_samples, self._pool.num_left)
        for _ in range(limit - self._limit):
            self._at_once.release()
        self._limit = max(self._limit, limit)

    async def _texts(self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool) -> tuple[str, ...]:
        _, payload = await self._pool.generate(prompt, group_id, num_completions, greedy)
        group: RolloutGroup = await within(
            payload, self._fetch_timeout_s, f"the answers of group {group_id}", "rollout.generate_timeout_s"
        )
        return tuple(str(self._tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in group.completions)
