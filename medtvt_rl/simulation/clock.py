"""An asyncio loop whose time jumps to the next timer: hours of waiting pass in the time that the code itself takes.

Owns: the clock, and the end of a simulation in which nothing more can happen. Does not own: what waits.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StuckError(RuntimeError):
    """Every task waits, and no timer is left to wake one."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: where the loop would, its time moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError("the simulation stands still: every task waits, and nothing is left to wake one")
        if timeout > 0:
            self.now += timeout
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0 and is that of the simulation, in seconds; no thread may be waited for."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._jumping.now


def run_simulated(main: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that runs on a clock of its own. Raises StuckError where it would wait for ever."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main)
