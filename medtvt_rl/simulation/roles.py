"""Scorers, references and learners on a simulated clock, as the loop sees them.

Owns: queues of these roles, their busy time. Does not own: how long anything takes (timings.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.config import Config
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.generators import NO_LOGPROBS, Driver
from medtvt_rl.simulation.timings import Timings
from medtvt_rl.simulation.world import Setting
from medtvt_rl.types import LearnerStep, ReferenceHeader


class _Actors:
    """Actors that do one thing at a time each; those who ask wait in order."""

    def __init__(self, count: int, cores: Cores, driver: Driver, threads: float = 1.0) -> None:
        self._free, self._cores, self._driver, self._threads = asyncio.Semaphore(count), cores, driver, threads
        self.busy_s = 0.0
        self._loop = asyncio.get_running_loop()

    async def work(self, seconds: float) -> None:
        async with self._free:
            await self._driver.call()
            began = self._loop.time()
            await self._cores.run(seconds, self._threads)
            self.busy_s += self._loop.time() - began


class SimulatedScorers(_Actors):
    """The Scoring of the loop; as many groups have equal rewards as was measured."""

    def __init__(self, setting: Setting, timings: Timings, cores: Cores, driver: Driver, seed: int = 0) -> None:
        super().__init__(setting.scorers, cores, driver)
        self._timings, self._random = timings, np.random.default_rng([seed, 1])

    async def score(self, group: Any) -> GroupRewards:
        """Rewards that mean nothing."""
        await self.work(self._timings.reward_s)
        size = len(group[0])
        equal = self._random.random() < self._timings.equal_share
        total = np.zeros(size, dtype=np.float32) if equal else np.arange(size, dtype=np.float32)
        none = np.zeros(size, dtype=bool)
        return GroupRewards(components={"reward": total}, total=total, failed=none, reasons=(None,) * size)


class SimulatedReferences(_Actors):
    """The Reference of the loop."""

    def __init__(self, setting: Setting, timings: Timings, cores: Cores, driver: Driver) -> None:
        super().__init__(setting.references, cores, driver)
        self._timings = timings

    async def logprobs(self, group: Any) -> tuple[Any, ReferenceHeader]:
        """No log-probs at all."""
        lengths, prompt_tokens = group
        await self.work(self._timings.reference_s(prompt_tokens + sum(lengths)))
        return None, ReferenceHeader(kl=np.zeros(len(lengths), dtype=np.float32), seconds=0.0)


class SimulatedLearner:
    """The Learner of the loop: a gang whose ranks work at the same time, and average their gradients.

    Attributes:
        trained: (begin, end, staleness of each group) of every step.
        waited_s: for groups, and for the generators' answer to the probe; tokens: of completions that were trained on.
    """

    def __init__(self, config: Config, setting: Setting, timings: Timings, cores: Cores, driver: Driver) -> None:
        self._updates, self._ranks = config.grpo.updates_per_batch, setting.learners
        self._threads = setting.learners * config.learner.num_threads if setting.cores != float("inf") else 1.0
        self._timings, self._cores, self._driver, self._setting = timings, cores, driver, setting
        self._loop = asyncio.get_running_loop()
        self.busy_s = self.waited_s = self.tokens = 0.0
        self._free_at = 0.0
        self.trained: list[tuple[float, float, tuple[int, ...]]] = []

    async def train_step(self, groups: Sequence[Any], learning_rate: float, version: int) -> LearnerStep:
        """Takes the time of a step."""
        tokens = sum(sum(lengths) + prompt for lengths, prompt in (each.group.payload for each in groups))
        self.tokens += sum(sum(each.group.header.lengths) for each in groups)
        began = self._loop.time()
        self.waited_s += began - self._free_at
        await self._work(self._timings.learner_s(tokens, self._updates, self._ranks) + self._exchange_s())
        staleness = tuple(version - each.group.header.oldest_version for each in groups)
        self.trained.append((began, self._loop.time(), staleness))
        return LearnerStep(metrics={"updates": float(self._updates), "skipped": 0.0})

    def _exchange_s(self) -> float:
        """Gradients, the size of what trains: once around the ring, both ways."""
        ranks = self._ranks
        volume = 2.0 * self._timings.weight_bytes * (ranks - 1) / ranks
        return self._updates * volume / self._setting.bytes_per_s

    async def export(self, version: int) -> tuple[int, int]:
        """Takes the time of an export."""
        self.waited_s += self._loop.time() - self.trained[-1][1]
        await self._work(self._timings.export_s)
        return version, 0

    async def score(self, group: Any, index: int) -> NDArray[np.float32]:
        """The learner's part of the probe."""
        await self._work(self._timings.score_s)
        self._free_at = self._loop.time()
        return NO_LOGPROBS

    async def _work(self, seconds: float) -> None:
        await self._driver.call()
        began = self._loop.time()
        await self._cores.run(seconds, self._threads)
        self.busy_s += self._loop.time() - began
