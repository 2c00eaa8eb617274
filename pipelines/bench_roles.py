"""Measures the real roles one after the other, each with the machine to itself, then two at once.

Owns: what is asked of them, and how often. Does not own: fitting (medtvt_rl/simulation/fit.py), the command (bench.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import numpy as np
import ray

from actors.learner_gang import LearnerGang
from actors.rollout_pool import RolloutPool
from actors.scoring_pools import ReferencePool, ScorerPool
from medtvt_rl.algorithm.advantages import has_signal
from medtvt_rl.config import Config
from medtvt_rl.simulation.fit import Generated
from medtvt_rl.types import Prompt
from pipelines.grpo_roles import FinishedGroup, TrainingGroup
from pipelines.training_groups import with_advantages

T = TypeVar("T")
ROUNDS = 3
GENERATIONS = ((1, 1), (2, 1), (4, 1), (1, 0), (2, 0), (4, 0), (8, 0), (16, 0))
"""(groups at once, completions of each; 0: grpo.group_size)."""
PHASES = ("generation", "scoring", "reference", "learner", "weights", "side by side")


@dataclass(slots=True, kw_only=True)
class Measured:
    """Raw observations, in seconds of the wall unless said otherwise.

    Attributes:
        scored, referenced, trained: (tokens, seconds).
        driver_calls, driver_cpu_s: calls of actors meanwhile, and the CPU that the driver took for them.
        asides: (alone, beside another role): the same work.
    """

    generated: list[Generated] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)
    referenced: list[tuple[float, float]] = field(default_factory=list)
    trained: list[tuple[float, float]] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    exports: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    weight_bytes: int = 0
    driver_calls: int = 0
    driver_cpu_s: float = 0.0
    asides: list[tuple[float, float]] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)


class RoleBench:
    """The actors of a run, of each role one.

    Args:
        prompts: of the task.
        progress: told how many of `len(PHASES)` phases are done.
    """

    def __init__(
        self,
        config: Config,
        rollouts: RolloutPool,
        scoring: ScorerPool,
        reference: ReferencePool | None,
        learner: LearnerGang,
        prompts: Sequence[Prompt],
        progress: Callable[[int], None],
    ) -> None:
        self._config, self._rollouts, self._scoring = config, rollouts, scoring
        self._reference, self._learner, self._prompts, self._progress = reference, learner, prompts, progress
        self.found = Measured()
        self._ids = iter(range(1 << 30))
        self._groups: list[FinishedGroup] = []
        self._version = 0

    async def measure(self) -> Measured:
        """All phases; the first call of every kind, which warms up, does not count."""
        phases = (self._generation, self._scores, self._references, self._steps, self._weights, self._side_by_side)
        for number, phase in enumerate(phases):
            self._progress(number)
            await phase()
        self._progress(len(phases))
        return self.found

    async def _timed(self, answer: Awaitable[T], calls: int = 1) -> tuple[float, T]:
        wall, cpu = time.perf_counter(), time.process_time()
        result = await answer
        self.found.driver_calls += calls
        self.found.driver_cpu_s += time.process_time() - cpu
        return time.perf_counter() - wall, result

    # Generators.

    async def _generation(self) -> None:
        size = self._config.grpo.group_size
        await self._generate(2, size, longer=False)
        for number in range(ROUNDS):
            for groups, completions in GENERATIONS:
                at_once = min(groups, max(1, self._config.rollout.engine.max_num_seqs // (completions or size)))
                longer = number % ROUNDS == ROUNDS - 1
                seconds, made = await self._generate(at_once, completions or size, longer)
                lengths = tuple(header.lengths for header, _, _ in made)
                if max(map(max, lengths)) == 0:
                    continue
                observed = Generated(
                    seconds=seconds, lengths=lengths, prompt_tokens=tuple(tokens for _, _, tokens in made)
                )
                self.found.generated.append(observed)
                if completions == 0 and not longer:
                    self._groups += [_finished(header, payload) for header, payload, _ in made]
        for _ in range(20):
            seconds, _ = await self._timed(self._rollouts.stats())
            self.found.answers.append(seconds)

    async def _generate(self, groups: int, completions: int, longer: bool) -> tuple[float, list[tuple[Any, Any, int]]]:
        chosen = [self._prompt(longer) for _ in range(groups)]
        asked = [self._rollouts.generate(prompt, group_id, completions) for group_id, prompt in chosen]
        seconds, made = await self._timed(asyncio.gather(*asked), groups)
        return seconds, [(*one, len(prompt.token_ids)) for one, (_, prompt) in zip(made, chosen)]

    def _prompt(self, longer: bool) -> tuple[int, Prompt]:
        """The next prompt and a group id; `longer`: as long as fits, so that length tells."""
        group_id = next(self._ids)
        prompt = self._prompts[group_id % len(self._prompts)]
        rollout = self._config.rollout
        room = rollout.engine.max_model_len - rollout.sampling.max_new_tokens - 1 - len(prompt.token_ids)
        if not longer or room < 1:
            return group_id, prompt
        # In front of its last token, which may begin the answer.
        ids = np.insert(prompt.token_ids, len(prompt.token_ids) - 1, np.repeat(prompt.token_ids[-1:], room))
        return group_id, replace(prompt, token_ids=ids)

    # Scorers and references.

    async def _scores(self) -> None:
        for number, group in enumerate(self._groups):
            seconds, rewards = await self._timed(self._scoring.score(group.payload))
            self._groups[number] = replace(group, rewards=rewards)
            self.found.equal.append(not has_signal(rewards.total))
            if number:
                self.found.scored.append(seconds)

    async def _references(self) -> None:
        if self._reference is None:
            return
        for number, group in enumerate(self._groups):
            seconds, (handle, header) = await self._timed(self._reference.logprobs(group.payload))
            self._groups[number] = replace(group, reference=handle, reference_header=header)
            if number:
                self.found.referenced.append((self._tokens([group]), seconds))

    def _tokens(self, groups: Sequence[FinishedGroup]) -> float:
        prompt = float(np.mean([len(prompt.token_ids) for prompt in self._prompts]))
        return sum(prompt + sum(group.header.lengths) for group in groups)

    # Learners.

    async def _steps(self) -> None:
        await self._train(self._batch(1))
        wanted = self._config.grpo.groups_per_step
        for _ in range(ROUNDS):
            for count in sorted({max(1, wanted // 4), max(1, wanted // 2), wanted}):
                batch = self._batch(count)
                seconds = await self._train(batch)
                self.found.trained.append((self._tokens([each.group for each in batch]), seconds))
        for _ in range(ROUNDS + 1):
            seconds, _ = await self._timed(self._learner.score(self._groups[0].payload, 0))
            self.found.probes.append(seconds)

    def _batch(self, count: int) -> list[TrainingGroup]:
        """So many groups, another choice each time; the same one twice where there are too few."""
        start = next(self._ids)
        chosen = [self._groups[(start * 7 + i) % len(self._groups)] for i in range(count)]
        limit = self._config.rollout.sampling.max_new_tokens
        return [with_advantages(group, self._config.grpo, limit) for group in chosen]

    async def _train(self, batch: list[TrainingGroup]) -> float:
        """At learning rate 0."""
        seconds, _ = await self._timed(self._learner.train_step(batch, 0.0, self._version))
        return seconds

    async def _weights(self) -> None:
        for number in range(ROUNDS + 1):
            self._version += 1
            export_s, (weights, checksum) = await self._timed(self._learner.export(self._version))
            load_s, _ = await self._timed(self._rollouts.update_weights(weights, self._version, checksum))
            if number:
                self.found.exports.append(export_s)
                self.found.loads.append(load_s)
            if number:
                await self._update_meanwhile(weights, checksum)
            if number == ROUNDS:
                reference: Any = getattr(weights, "buffer", weights)
                buffer: Any = ray.get(reference, timeout=self._config.rollout.update_timeout_s)
                self.found.weight_bytes = buffer.num_bytes

    async def _update_meanwhile(self, weights: Any, checksum: int) -> None:
        """A full engine gets weights half-way: what runs is computed again."""
        groups = max(1, self._config.rollout.engine.max_num_seqs // self._config.grpo.group_size)
        most = max(sum(map(len, each.lengths)) for each in self.found.generated)
        usual_s = median(e.seconds for e in self.found.generated if sum(map(len, e.lengths)) == most)
        began = time.perf_counter()
        making = asyncio.ensure_future(self._generate(groups, self._config.grpo.group_size, longer=False))
        await asyncio.sleep(usual_s / 2)
        at_s = time.perf_counter() - began
        await self._rollouts.update_weights(weights, self._version, checksum)
        load_s = self.found.loads[-1]
        seconds, made = await making
        if load_s < seconds and at_s < seconds:
            observed = Generated(
                seconds=seconds - load_s,
                lengths=tuple(header.lengths for header, _, _ in made),
                prompt_tokens=tuple(tokens for _, _, tokens in made),
                updated_at=at_s / seconds,
            )
            self.found.generated.append(observed)

    # Two at once.

    async def _side_by_side(self) -> None:
        """The learner's step while a generator is busy all the time, over its step alone: what both lose although each
        has a core."""
        batch = self._batch(self._config.grpo.groups_per_step)
        alone = median([await self._train(batch) for _ in range(ROUNDS)])
        endless = [asyncio.create_task(self._keep_busy()) for _ in range(4)]
        try:
            await asyncio.sleep(0.5)
            for _ in range(ROUNDS):
                self.found.asides.append((alone, await self._train(batch)))
        finally:
            for task in endless:
                task.cancel()
            await asyncio.gather(*endless, return_exceptions=True)

    async def _keep_busy(self) -> None:
        while True:
            group_id, prompt = self._prompt(longer=False)
            await self._rollouts.generate(prompt, group_id, self._config.grpo.group_size)


def _finished(header: Any, payload: Any) -> FinishedGroup:
    return FinishedGroup(header=header, payload=payload, rewards=None, reference=None, reference_header=None)  # type: ignore[arg-type]
