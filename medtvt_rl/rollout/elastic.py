"""How many generators a run needs: one more while the learner waits for groups, one fewer while they are idle.

    after every step: policy.decide(now, Signals(...)) -> -1, 0 or +1

Owns: the decision. Pure: no clock, no actors. Does not own: how a generator is added or removed, or the bounds' meaning
for a cluster (actors/). What keeps it from swinging: both shares are taken over a window that begins anew with every
change; a cool-down; and one is only removed where those that are left would still be idle for a share of `spare`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from medtvt_rl.rollout.config import ElasticConfig

Decision = Literal[-1, 0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What happened since the decision before.

    Attributes:
        seconds: that passed.
        learner_waited_s: of these the learner waited for groups, or for what generators measure of a version: a probe,
            which waits behind their groups (`seconds/wait_groups` and `seconds/conclude` of a step).
        generator_idle_s: of these a generator, on average, had nothing to do, because the buffer was full
            (`seconds/rollout_idle`).
        generators: that serve.
        starting: on their way, successors of lost ones included.
    """

    seconds: float
    learner_waited_s: float
    generator_idle_s: float
    generators: int
    starting: int = 0


class ElasticPolicy:
    """Decides on one generator at a time.

    Args:
        low, high: fewest and most generators, those on their way included.
    """

    def __init__(self, config: ElasticConfig, low: int, high: int) -> None:
        self._config, self._low, self._high = config, low, high
        self._seen: deque[Signals] = deque()
        self._count: int | None = None
        self._changed_at = 0.0

    def decide(self, now: float, signals: Signals) -> Decision:
        """+1: start one more; -1: take one out of service; 0: nothing.

        Args:
            now: seconds on any clock that does not go back.
        """
        count = signals.generators + signals.starting
        if count < self._low:
            return self._decided(now, 1)
        if count > self._high:
            return self._decided(now, -1)
        if signals.starting or signals.generators != self._count:
            # What was seen is of another number of generators; and the first step with a new number is of both.
            self._count = None if signals.starting else signals.generators
            self._seen.clear()
            self._changed_at = now
            return 0
        self._seen.append(signals)
        while len(self._seen) > self._config.min_steps and self._seconds() - self._seen[0].seconds >= self._window_s:
            self._seen.popleft()
        settled = now - self._changed_at >= self._config.cooldown_s
        if not settled or len(self._seen) < self._config.min_steps or self._seconds() < self._window_s:
            return 0
        return self._judged(now, count)

    def _judged(self, now: float, count: int) -> Decision:
        seconds = max(self._seconds(), 1e-9)
        waits = sum(each.learner_waited_s for each in self._seen) / seconds
        idle = sum(each.generator_idle_s for each in self._seen) / seconds
        if waits > self._config.add_above and waits > idle and count < self._high:
            return self._decided(now, 1)
        if waits < self._config.remove_below and count > self._low:
            idle_with_one_fewer = 1.0 - (1.0 - idle) * count / (count - 1)
            if idle_with_one_fewer > self._config.spare:
                return self._decided(now, -1)
        return 0

    def _decided(self, now: float, decision: Decision) -> Decision:
        self._seen.clear()
        self._count, self._changed_at = None, now
        return decision

    @property
    def _window_s(self) -> float:
        return self._config.window_s

    def _seconds(self) -> float:
        return sum(each.seconds for each in self._seen)
