"""Who gets the next group: unlike generators get work in proportion to their measured speed.

Speed is completed tokens over the seconds in which a generator had work, a moving average. The next group goes where it
would be finished first, (completions under way + its own) / speed. That alone would never ask one that is far slower
than the rest, and never learn that it has become faster: one that is idle gets the next group once the others have had
as many as correspond to its share.

Owns: the measure, the order. Does not own: what is asked of a generator (actors/rollout_pool.py). Pure but for the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WINDOW_S = 120.0
"""Of work: what was measured so long ago counts 1/e."""


@dataclass(slots=True)
class _Track:
    """Of one generator; `tokens` and `busy_s` are the moving sums, `all_tokens` and `groups` those of the whole run."""

    tokens: float = 0.0
    busy_s: float = 0.0
    all_tokens: int = 0
    groups: int = 0
    under_way: int = 0
    since: float = 0.0
    passed_over: int = 0

    def pass_time(self, now: float) -> None:
        """Adds the time since the last event, if there was work."""
        if self.under_way:
            gone = max(0.0, now - self.since)
            kept = math.exp(-gone / WINDOW_S)
            self.tokens, self.busy_s = self.tokens * kept, self.busy_s * kept + gone
        self.since = now


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one generator did of the whole: its share of the tokens, 0..1; `tokens_per_s` is None before the first."""

    index: int
    tokens: int
    groups: int
    share: float
    tokens_per_s: float | None


class Balance:
    """The speeds of a run's generators, and whose turn it is.

    Args:
        by_speed: else everyone counts as equally fast, and what is handed out does not depend on the clock.
    """

    def __init__(self, by_speed: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._by_speed, self._clock = by_speed, clock
        self._tracks: dict[int, _Track] = {}

    def begin(self, index: int) -> None:
        """A generator was given completions to make."""
        for other, track in self._tracks.items():
            track.passed_over += other != index
        track = self._track(index)
        track.pass_time(self._clock())
        track.under_way += 1
        track.passed_over = 0

    def end(self, index: int, tokens: int) -> None:
        """It made them, or failed at it and made no tokens."""
        track = self._track(index)
        track.pass_time(self._clock())
        track.under_way -= 1
        track.tokens += tokens
        track.all_tokens += tokens
        track.groups += tokens > 0

    def started_anew(self, index: int) -> None:
        """Another process has its place, maybe on another machine: what was measured says nothing of it."""
        track = self._track(index)
        track.tokens = track.busy_s = 0.0
        track.passed_over = 0

    def order(self, loads: Mapping[int, int], size: int) -> list[int]:
        """Whose turn it is to make `size` completions, the first first.

        Args:
            loads: completions under way, of each generator that may be asked.
        """
        if not self._by_speed:
            return sorted(loads, key=lambda index: (loads[index], index))
        speeds = self._speeds(list(loads))
        total = sum(speeds.values())

        def place(index: int) -> tuple[bool, float, int]:
            waited_long = self._track(index).passed_over >= total / speeds[index]
            due = loads[index] == 0 and waited_long
            return not due, (loads[index] + size) / speeds[index], index

        return sorted(loads, key=place)

    def shares(self) -> list[Share]:
        """What each generator did, those that have left included."""
        total = sum(track.all_tokens for track in self._tracks.values())
        return [
            Share(
                index=index,
                tokens=track.all_tokens,
                groups=track.groups,
                share=track.all_tokens / max(1, total),
                tokens_per_s=_speed(track),
            )
            for index, track in sorted(self._tracks.items())
        ]

    def _speeds(self, indices: list[int]) -> dict[int, float]:
        """Above 0; one that is not measured yet counts as the mean of the others."""
        found = {index: _speed(self._track(index)) for index in indices}
        known = [speed for speed in found.values() if speed]
        usual = sum(known) / len(known) if known else 1.0
        return {index: speed or usual for index, speed in found.items()}

    def _track(self, index: int) -> _Track:
        return self._tracks.setdefault(index, _Track(since=self._clock()))


def _speed(track: _Track) -> float | None:
    return track.tokens / track.busy_s if track.tokens > 0 and track.busy_s > 0 else None
