"""Every wait has a deadline and says what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class OvertakenError(RuntimeError):
    """An event came before what was awaited."""


class DeadlineError(RuntimeError):
    """Something did not answer in time; the message says what, and which setting holds the deadline."""


async def within(awaitable: Awaitable[T], seconds: float, what: str, setting: str) -> T:
    """Awaits, for at most so many seconds.

    Args:
        what: what is waited for, e.g. "rollout 0 to generate group 17".
        setting: the configuration key of the deadline.

    Raises:
        DeadlineError: the time is over.
    """
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as error:
        raise DeadlineError(f"waited {seconds:g} s ({setting}) for {what}") from error


async def before(event: asyncio.Event, awaitable: Awaitable[T]) -> T:
    """Awaits until an event comes. Raises OvertakenError if it comes first."""
    task, overtaken = asyncio.ensure_future(awaitable), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, overtaken}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise OvertakenError
        return task.result()
    finally:
        task.cancel()
        overtaken.cancel()
