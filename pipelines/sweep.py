"""Which simulated runs answer the questions: how many generators, which ratio, what a straggler or a loss costs.

Owns: the runs and what is concluded from them. Does not own: a run (simulation.py), how it is shown (simulate.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medtvt_rl.config import Config
from medtvt_rl.simulation.formulas import best_ratio
from medtvt_rl.simulation.timings import Timings
from medtvt_rl.simulation.world import Setting, setting_of
from pipelines.simulate import HEAD, row
from pipelines.simulation import Outcome, simulate

if TYPE_CHECKING:
    from actors.elastic import Policy

ENOUGH = 1.05
"""So many times the shortest step is near enough to it."""
MAX_LOSS_STEPS = 2000
FEW_STEPS = 10
MANY_GENERATORS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The fewest generators with which learners of so many ranks wait next to never.

    Attributes:
        step_s: with them; shortest_s: with as many as one likes. formula: generators by the formula.
    """

    learners: int
    groups_per_step: int
    generators: int
    step_s: float
    shortest_s: float
    formula: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One generator is gone for a while.

    Attributes:
        delay_s: by which a run that is otherwise the same ends later; again: groups that were begun twice.
    """

    generators: int
    seconds: float
    delay_s: float
    again: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All runs.

    Attributes:
        here: as configured, on the machine that was measured; None where the run joins a cluster.
        by_generators: each role on machines of its own.
        usual, straggler: one setting, with all generators alike and with a slow one.
        elastic: between `rollout.min` and `rollout.max`; None where no policy decides.
    """

    here: Outcome | None
    by_generators: tuple[Outcome, ...]
    ratios: tuple[Ratio, ...]
    usual: Outcome
    straggler: Outcome
    loss: Loss
    elastic: Outcome | None


class Sweep:
    """Makes the runs of a configuration, and tells of each when it is done.

    Args:
        policy: decides how many generators serve in one of them; None leaves that one out.
    """

    def __init__(
        self,
        config: Config,
        timings: Timings,
        steps: int,
        tell: Callable[[str], None],
        policy: Policy | None = None,
    ) -> None:
        self._config, self._timings, self._steps, self._tell, self._policy = config, timings, steps, tell, policy

    def all(self, generators: Sequence[int], learners: Sequence[int], slowness: float, loss_s: float) -> Findings:
        """Every run, in the order of Findings."""
        here = self._here() if self._config.cluster.address is None else None
        self._tell("each role on machines of its own")
        self._tell(HEAD)
        by_generators = [self._told(setting_of(self._config, count)) for count in generators]
        self._tell("fewest generators with which the learners wait next to never; groups, scorers, references per rank")
        ratios = [self._ratio(count) for count in learners]
        usual, straggler = self._straggler(ratios, slowness)
        loss = self._loss(usual, loss_s)
        elastic = None if self._policy is None else self._elastic(self._policy)
        if elastic is None and self._config.rollout.least < self._config.rollout.most:
            self._tell("elastic: rollout.scaling is room, so the nodes decide; rollout.scaling=need is simulated")
        return Findings(
            here=here,
            by_generators=tuple(by_generators),
            ratios=tuple(ratios),
            usual=usual,
            straggler=straggler,
            loss=loss,
            elastic=elastic,
        )

    def _run(self, setting: Setting, steps: int | None = None, policy: Policy | None = None) -> Outcome:
        wanted = steps or (self._steps if setting.generators <= MANY_GENERATORS else min(self._steps, FEW_STEPS))
        return simulate(self._config, setting, self._timings, wanted, policy)

    def _told(self, setting: Setting) -> Outcome:
        outcome = self._run(setting)
        self._tell(row(outcome))
        return outcome

    def _here(self) -> Outcome:
        cores = self._timings.cores
        self._tell(f"as configured, all on one machine of {cores} cores")
        self._tell(HEAD)
        return self._told(setting_of(self._config, cores=float(cores)))

    # The best ratio.

    def _scaled(self, learners: int, generators: int) -> Setting:
        """The configuration for so many ranks, each with as many groups, scorers and references as configured."""
        setting, ranks = setting_of(self._config, generators), self._config.learner.num_workers

        def times(count: int) -> int:
            return math.ceil(count * learners / ranks)

        return replace(
            setting,
            learners=learners,
            groups_per_step=times(setting.groups_per_step),
            scorers=times(setting.scorers),
            references=times(setting.references),
        )

    def _ratio(self, learners: int) -> Ratio:
        """By bisection: a step never takes longer with more generators, but for the driver's work."""
        groups = self._scaled(learners, 1).groups_per_step
        formula = learners * best_ratio(self._config, self._timings, max(1, groups // learners), learners)
        outcomes: dict[int, Outcome] = {}

        def step_s(generators: int) -> float:
            if generators not in outcomes:
                outcomes[generators] = self._run(self._scaled(learners, generators), FEW_STEPS)
            return outcomes[generators].step_s

        high = max(2, math.ceil(1.5 * formula))
        while high < 4096 and step_s(2 * high) < step_s(high) / ENOUGH:
            high *= 2
        shortest_s = min(step_s(high), step_s(2 * high) if 2 * high in outcomes else math.inf)
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if step_s(middle) <= ENOUGH * shortest_s else (middle, high)
        found = Ratio(
            learners=learners,
            groups_per_step=groups,
            generators=high,
            step_s=step_s(high),
            shortest_s=shortest_s,
            formula=formula,
        )
        self._tell(
            f"  {learners} learner rank(s), {groups} groups a step: {high} generators ({high / learners:.2f} a rank; "
            f"the formula says {formula / learners:.2f}), {found.step_s:.2f} s a step, limited by the "
            f"{outcomes[high].bottleneck}"
        )
        return found

    # What goes wrong.

    def _straggler(self, ratios: Sequence[Ratio], slowness: float) -> tuple[Outcome, Outcome]:
        """At the best ratio, where every generator counts; of two at least."""
        best = ratios[0]
        setting = self._scaled(best.learners, max(2, best.generators))
        usual, slow = self._run(setting), self._run(replace(setting, straggler=slowness))
        self._tell(
            f"straggler: one of {setting.generators} generators {slowness:g} times slower: {slow.step_s:.2f} s a step "
            f"instead of {usual.step_s:.2f} ({slow.step_s / usual.step_s - 1:+.0%}); "
            f"{1 - 1 / slowness:.0%} of one of {setting.generators} is {(1 - 1 / slowness) / setting.generators:.0%}"
        )
        return usual, slow

    def _loss(self, usual: Outcome, seconds: float) -> Loss:
        """The last generator goes a quarter of the run after its begin, and comes back after so many seconds."""
        setting, count = usual.setting, usual.setting.generators
        # Where an outage lasts longer than the simulation may, a shorter one tells the same.
        seconds = min(seconds, MAX_LOSS_STEPS / 3 * usual.step_s)
        steps = max(self._steps, math.ceil(2 * (seconds + self._timings.start_s) / usual.step_s))
        begin_s = steps * usual.step_s / 4
        lost = replace(setting, lost=((count - 1, begin_s, begin_s + seconds),))
        whole, broken = self._run(setting, steps), self._run(lost, steps)
        found = Loss(generators=count, seconds=seconds, delay_s=broken.ends[-1] - whole.ends[-1], again=broken.again)
        self._tell(
            f"loss: one of {count} generators gone for {seconds / 60:.1f} min and {self._timings.start_s:.0f} s of "
            f"start: the run ends {found.delay_s:.0f} s later, {found.again} groups were begun twice"
        )
        return found

    def _elastic(self, policy: Policy) -> Outcome:
        """From `rollout.num_generators` on, until the number has had time to settle."""
        from actors.elastic import Asked  # with Ray, which no other run here needs

        low, high = self._config.rollout.least, self._config.rollout.most
        settings = self._config.rollout.elastic
        first = self._run(setting_of(self._config), FEW_STEPS)
        per_change_s = settings.window_s + settings.cooldown_s + self._timings.start_s
        steps = math.ceil((high - low + 3) * per_change_s / first.step_s)
        asked = Asked(policy, self._config.rollout.scaling, lambda line: self._tell(f"elastic: {line}"))
        outcome = self._run(setting_of(self._config), min(max(steps, self._steps), MAX_LOSS_STEPS), asked)
        counts = " ".join(f"{count} at {at:.0f} s," for at, count in outcome.generators).rstrip(",")
        bounds = f"rollout.scaling {self._config.rollout.scaling}, rollout.min {low} to rollout.max {high}"
        self._tell(f"elastic, {bounds}: {counts}; {outcome.step_s:.2f} s a step")
        return outcome
