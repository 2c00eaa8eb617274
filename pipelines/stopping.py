"""SIGTERM and SIGINT: a run is asked to stop, writes a checkpoint, and ends with a line and an exit code.

Owns: the handlers of the driver, waiting that a request to stop ends. Does not own: what is kept (grpo_loop.py).
`ray job stop` and Ctrl-C signal the driver alone; the actors live on until it ends. For nodes that will be taken away
see actors/drain.py.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(RuntimeError):
    """The run was asked to stop; the message says from where it goes on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


class Stop:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.number: int = signal.SIGTERM

    def request(self, number: int = signal.SIGTERM) -> None:
        """Asks the run to stop."""
        self.number = number
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Returns when the run is asked to stop."""
        await self._event.wait()

    async def unless(self, awaitable: Awaitable[T], otherwise: T) -> T:
        """What an awaitable gives, or `otherwise` once a stop is requested; it is cancelled then."""
        task, stop = asyncio.ensure_future(awaitable), asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else otherwise
        finally:
            stop.cancel()
            task.cancel()


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Within it the first signal requests a stop, and another one ends the work at once, by cancelling this task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def ask(number: int) -> None:
        if stop.requested:
            task.cancel()
        stop.request(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, ask, number)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
        # Removing a handler leaves the default action, which would end the process before it has put away its things.
        stop_at_once()


_came: int = signal.SIGINT


def stop_at_once() -> None:
    """From now on SIGTERM raises KeyboardInterrupt in the main thread, as SIGINT does: what else a handler raises does
    not end a wait of Ray's."""
    global _came
    _came = signal.SIGINT
    signal.signal(signal.SIGTERM, _raise)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    global _came
    _came = number
    raise KeyboardInterrupt


def stopped_at_once(message: str = "finished stages are kept, and the same command goes on from there") -> Stopped:
    """What a KeyboardInterrupt was raised for."""
    return Stopped(_came, message)


def cancelled(leftover: Sequence[asyncio.Future[Any]]) -> Awaitable[Any]:
    """Cancels tasks and other futures, and waits for their ends."""
    for task in leftover:
        task.cancel()
    return asyncio.gather(*leftover, return_exceptions=True)
