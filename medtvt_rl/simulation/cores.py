"""Something that several share, each getting an equal part: the cores of a machine, or a network link.

Owns: how long work takes while others work, too. Does not own: what the work is.
With B threads busy on C cores each runs at min(1, C / B) of its speed. Time is kept in seconds of a thread that runs at
this common speed, so that a change costs O(log n), however many are at work.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Work:
    """A piece of work under way; `done` is set when it is through, or taken off."""

    begun_at: float
    seconds: float
    threads: float
    done: asyncio.Future[None] = field(repr=False)
    left_at: float | None = None


class Cores:
    """Equal shares of `capacity` threads.

    Args:
        capacity: infinite where everybody has cores of its own.
        beside: speed of a thread while another one runs on the machine, 1 where they do not disturb each other.
    """

    def __init__(self, capacity: float = math.inf, beside: float = 1.0) -> None:
        self.capacity, self.beside = capacity, beside
        self._loop = asyncio.get_running_loop()
        self._clock, self._at, self._busy = 0.0, self._loop.time(), 0.0
        self._heap: list[tuple[float, int, Work]] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, seconds: float, threads: float = 1.0) -> None:
        """Returns when work is done that takes so many seconds alone."""
        if seconds <= 0:
            return
        work = self.begin(seconds, threads)
        try:
            await work.done
        finally:
            self.leave(work)

    def begin(self, seconds: float, threads: float = 1.0) -> Work:
        """Work that goes on until it is done, or `leave` ends it."""
        self._advance()
        work = Work(self._clock, seconds, threads, self._loop.create_future())
        self._count += 1
        heapq.heappush(self._heap, (self._clock + seconds, self._count, work))
        self._busy += threads
        self._set_timer()
        return work

    def leave(self, work: Work) -> float:
        """Ends work, done or not; the seconds of it, as it would have taken them alone, that were done."""
        if work.left_at is None:
            self._advance()
            work.left_at = self._clock
            self._busy -= work.threads
            self._set_timer()
        return min(work.left_at - work.begun_at, work.seconds)

    @property
    def _speed(self) -> float:
        if self._busy <= 1.0 or math.isinf(self.capacity):
            return 1.0
        return min(1.0, self.capacity / self._busy) * self.beside

    def _advance(self) -> None:
        now = self._loop.time()
        self._clock += (now - self._at) * self._speed
        self._at = now

    def _set_timer(self) -> None:
        """The busy threads, and with them the speed, have changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and self._heap[0][2].left_at is not None:
            heapq.heappop(self._heap)
        if self._heap:
            left = max(0.0, self._heap[0][0] - self._clock) / self._speed
            self._timer = self._loop.call_later(left, self._through)

    def _through(self) -> None:
        self._timer = None
        self._advance()
        while self._heap and (self._heap[0][0] <= self._clock + 1e-9 or self._heap[0][2].left_at is not None):
            _, _, work = heapq.heappop(self._heap)
            if work.left_at is None:
                work.left_at = work.begun_at + work.seconds
                self._busy -= work.threads
                if not work.done.done():
                    work.done.set_result(None)
        self._set_timer()
