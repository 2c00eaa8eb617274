"""One simulated run: the real loop, ledger, buffer and sampler on a clock that jumps; the roles only take time.

Owns: putting it together, what is measured of it. Does not own: the roles (medtvt_rl/simulation), which runs are made
and how they are shown (simulate.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from medtvt_rl.config import Config
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.rollout.elastic import Signals
from medtvt_rl.simulation.clock import run_simulated
from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.generators import Driver, SimulatedGenerators
from medtvt_rl.simulation.roles import SimulatedLearner, SimulatedReferences, SimulatedScorers
from medtvt_rl.simulation.timings import Timings
from medtvt_rl.simulation.world import Setting
from medtvt_rl.types import Prompt
from pipelines.grpo_loop import GrpoLoop
from pipelines.grpo_roles import FinishedGroup, TrainedStep, TrainingGroup

if TYPE_CHECKING:
    from actors.elastic import Policy

NUM_PROMPTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run, between its warm-up and its end. Shares are of the time of all actors of a role.

    Attributes:
        step_s: seconds a step.
        generator_idle, learner_idle, scorer_idle, reference_idle, driver_idle: shares without work.
        learner_waits: share of the time that the learner waited for groups.
        staleness, max_staleness: of the groups, where they were trained on.
        again: groups that were made again because their generator was lost.
        ends: when the weights of each step were published; seconds.
        generators: (seconds, number that served) at each change.
    """

    setting: Setting
    step_s: float
    groups_per_s: float
    tokens_per_s: float
    generator_idle: float
    learner_idle: float
    learner_waits: float
    scorer_idle: float
    reference_idle: float
    driver_idle: float
    staleness: float
    max_staleness: int
    again: int
    ends: tuple[float, ...]
    generators: tuple[tuple[float, int], ...]

    @property
    def bottleneck(self) -> str:
        """The role that is idle least."""
        idle = {"generators": self.generator_idle, "learners": self.learner_idle, "scorers": self.scorer_idle}
        idle |= {"references": self.reference_idle, "driver": self.driver_idle}
        return min(idle, key=lambda name: idle[name])


class _Silent:
    """Nobody is told how a simulated run goes."""

    def step(self, trained: TrainedStep) -> None: ...
    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None: ...
    def replaced(self, group: FinishedGroup) -> None: ...
    def nonfinite(self, step: int, groups: Sequence[TrainingGroup], reason: str, updates: int) -> None: ...
    def measured(self, metrics: Mapping[str, float]) -> None: ...
    def unmeasured(self, version: int, what: str, error: Exception) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """Totals at a publication: seconds of work by role, of service of the generators, of waiting of the learner."""

    at: float
    generators: float
    served: float
    learner: float
    waited: float
    scorers: float
    references: float
    driver: float
    tokens: float


class _Run:
    """The roles of one run, read at every publication."""

    def __init__(self, config: Config, setting: Setting, timings: Timings, policy: Policy | None, seed: int) -> None:
        cores = Cores(setting.cores, timings.beside)
        self.driver = Driver(timings, cores)
        self.rollouts = SimulatedGenerators(config, setting, timings, cores, self.driver, seed)
        self.scoring = SimulatedScorers(setting, timings, cores, self.driver, seed)
        self.references = SimulatedReferences(setting, timings, cores, self.driver)
        self.learner = SimulatedLearner(config, setting, timings, cores, self.driver)
        self.readings = [self._reading()]
        self.tasks: list[asyncio.Task[None]] = []
        self._policy, self._least, self._most = policy, config.rollout.least, config.rollout.most
        self.rollouts.on_published = self._published

    def _reading(self) -> _Reading:
        busy_s, served_s = self.rollouts.totals()
        return _Reading(
            at=asyncio.get_running_loop().time(),
            generators=busy_s,
            served=served_s,
            learner=self.learner.busy_s,
            waited=self.learner.waited_s,
            scorers=self.scoring.busy_s,
            references=self.references.busy_s,
            driver=self.driver.busy_s,
            tokens=self.learner.tokens,
        )

    def _published(self) -> None:
        before, now = self.readings[-1], self._reading()
        self.readings.append(now)
        if self._policy is None:
            return
        seconds, served_s = now.at - before.at, now.served - before.served
        idle_share = 1.0 - (now.generators - before.generators) / max(served_s, 1e-9)
        signals = Signals(
            seconds=seconds,
            learner_waited_s=now.waited - before.waited,
            generator_idle_s=seconds * idle_share,
            generators=self.rollouts.count,
            starting=self.rollouts.starting,
        )
        decision = self._policy.decide(now.at, signals)
        if decision > 0 and signals.generators + signals.starting < self._most:
            self.tasks.append(asyncio.create_task(self.rollouts.add()))
        elif decision < 0 and not signals.starting and signals.generators > self._least:
            self.rollouts.remove()

    async def lose(self, index: int, begin_s: float, end_s: float | None) -> None:
        """A generator is gone from one time to another; None: for good."""
        await asyncio.sleep(begin_s)
        self.rollouts.lose(index)
        if end_s is not None:
            await asyncio.sleep(end_s - begin_s)
            await self.rollouts.add(index)

    async def slow_down(self, at_s: float, slowness: float) -> None:
        """All generators are slower from a time on."""
        await asyncio.sleep(at_s)
        self.rollouts.slow_down(slowness)


def simulate(
    config: Config,
    setting: Setting,
    timings: Timings,
    steps: int,
    policy: Policy | None = None,
    slower: tuple[float, float] | None = None,
    seed: int = 0,
) -> Outcome:
    """One run of so many steps, beside those in which it warms up and ends.

    Args:
        policy: adds and removes generators, between `rollout.min` and `rollout.max`.
        slower: from so many seconds on every generator is so many times slower.
    """
    lag = config.grpo.max_staleness + 1
    held_out = replace(config.grpo.held_out, every_steps=0)
    grpo = replace(
        config.grpo,
        steps=steps + 2 * lag,
        groups_per_step=setting.groups_per_step,
        held_out=held_out,
        checkpoint_every=0,
    )

    async def main() -> _Run:
        run = _Run(config, setting, timings, policy, seed)
        prompt = Prompt(prompt_id="p", token_ids=np.zeros(1, dtype=np.int32), item_id=None, ground_truth="")
        roles = run.rollouts, run.scoring, run.references if setting.references else None, run.learner
        loop = GrpoLoop(grpo, 1 << 30, PromptSampler([prompt] * NUM_PROMPTS, seed), *roles, _Silent())
        run.tasks += [asyncio.create_task(run.lose(*loss)) for loss in setting.lost]
        if slower is not None:
            run.tasks.append(asyncio.create_task(run.slow_down(*slower)))
        await loop.run()
        for task in run.tasks:
            task.cancel()
        run.rollouts.stop()
        return run

    return _outcome(run_simulated(main()), setting, lag)


def _outcome(run: _Run, setting: Setting, lag: int) -> Outcome:
    """Leaves out the first steps, before which nothing was under way, and the last, after which nothing is begun."""
    first, last = run.readings[lag], run.readings[-1 - lag]
    count, seconds = len(run.readings) - 2 * lag - 1, last.at - first.at
    ages = [age for _, _, ages in run.learner.trained[lag : len(run.learner.trained) - lag] for age in ages]

    def idle(role: str, actors: float) -> float:
        return 1.0 - (getattr(last, role) - getattr(first, role)) / max(actors * seconds, 1e-9)

    return Outcome(
        setting=setting,
        step_s=seconds / count,
        groups_per_s=count * setting.groups_per_step / seconds,
        tokens_per_s=(last.tokens - first.tokens) / seconds,
        generator_idle=1.0 - (last.generators - first.generators) / max(last.served - first.served, 1e-9),
        learner_idle=idle("learner", 1),
        learner_waits=(last.waited - first.waited) / seconds,
        scorer_idle=idle("scorers", setting.scorers),
        reference_idle=idle("references", setting.references) if setting.references else 1.0,
        driver_idle=idle("driver", 1),
        staleness=float(np.mean(ages)),
        max_staleness=max(ages),
        again=run.rollouts.again,
        ends=tuple(reading.at for reading in run.readings[1:]),
        generators=tuple(run.rollouts.serving),
    )
