"""Those who wait for an actor that is free, in the order of asking.

Owns: the queue, and who is woken. Does not own: who is free (roster.py).
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Thousands may wait: one that is free wakes one of them."""

    def __init__(self) -> None:
        self._queue: deque[asyncio.Future[None]] = deque()

    async def wait(self, first: bool = False) -> None:
        """Returns when it is the caller's turn.

        Args:
            first: before all others, as one whose turn came to nothing.
        """
        waiter = asyncio.get_running_loop().create_future()
        if first:
            self._queue.appendleft(waiter)
        else:
            self._queue.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.next()  # it was this one's turn
            raise

    def next(self) -> None:
        """Wakes the first one."""
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def all(self) -> None:
        """Wakes everybody."""
        for _ in range(len(self._queue)):
            self.next()
