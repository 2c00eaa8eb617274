"""Who gets the next group: unlike generators get work in proportion to their measured speed.

Speed is completed tokens over the seconds in which a generator had work, a moving average. The next group goes where it
would be finished first, (completions under way + its own) / speed. That alone would never ask one that is far slower
than the rest, and never learn that it has become faster: one that is idle gets the next group once the others have had
as many as correspond to its share.

Owns: the measure, the order. Does not own: what is asked of a generator (actors/rollout_pool.py). Pure but for the
clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

WINDOW_S = 120.0
"""Of work: what was measured so long ago counts 1/e."""


@dataclass(slots=True)
class _Track:
    """Of one generator.

    Attributes:
        tokens, busy_s: moving sums; speed: the one over the other, 0 before the first measurement.
        all_tokens, groups: of the whole run.
        since: when the time was last added; last_turn: how many turns there had been when it had its last.
    """

    tokens: float = 0.0
    busy_s: float = 0.0
    speed: float = 0.0
    all_tokens: int = 0
    groups: int = 0
    under_way: int = 0
    since: float = 0.0
    last_turn: int = 0

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
        self._turns = 0

    def begin(self, index: int) -> None:
        """A generator was given completions to make."""
        track = self._track(index)
        track.pass_time(self._clock())
        track.under_way += 1
        self._turns += 1
        track.last_turn = self._turns

    def end(self, index: int, tokens: int) -> None:
        """It made them, or failed at it and made no tokens."""
        track = self._track(index)
        track.pass_time(self._clock())
        track.under_way -= 1
        track.tokens += tokens
        track.all_tokens += tokens
        track.groups += tokens > 0
        if track.tokens > 0 and track.busy_s > 0:
            track.speed = track.tokens / track.busy_s

    def started_anew(self, index: int) -> None:
        """Another process has its place, maybe on another machine: what was measured says nothing of it."""
        track = self._track(index)
        track.tokens = track.busy_s = track.speed = 0.0
        track.last_turn = self._turns

    def order(self, loads: Mapping[int, int], size: int) -> list[int]:
        """Whose turn it is to make `size` completions, the first first.

        Args:
            loads: completions under way, of each generator that may be asked.
        """
        if not self._by_speed:
            return sorted(loads, key=lambda index: (loads[index], index))
        tracks = [self._track(index) for index in loads]
        known = [track.speed for track in tracks if track.speed]
        # One that is not measured yet counts as the mean of the others.
        usual = sum(known) / len(known) if known else 1.0
        speeds = [track.speed or usual for track in tracks]
        total, turns = sum(speeds), self._turns
        places = [
            (load > 0 or (turns - track.last_turn) * speed < total, (load + size) / speed, index)
            for (index, load), track, speed in zip(loads.items(), tracks, speeds)
        ]
        return [index for _, _, index in sorted(places)]

    def shares(self) -> list[Share]:
        """What each generator did, those that have left included."""
        total = sum(track.all_tokens for track in self._tracks.values())
        return [
            Share(
                index=index,
                tokens=track.all_tokens,
                groups=track.groups,
                share=track.all_tokens / max(1, total),
                tokens_per_s=track.speed or None,
            )
            for index, track in sorted(self._tracks.items())
        ]

    def slowest(self, indices: Collection[int]) -> int:
        """Who of these is best gone without: one that is not measured, else the slowest; of equals the newest."""
        speeds = {index: track.speed for index, track in self._tracks.items()}
        return min(indices, key=lambda index: (speeds.get(index, 0.0), -index))

    def _track(self, index: int) -> _Track:
        track = self._tracks.get(index)
        if track is None:
            track = self._tracks[index] = _Track(since=self._clock(), last_turn=self._turns)
        return track
