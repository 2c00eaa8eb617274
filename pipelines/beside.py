"""Work that goes on beside other work, and ends with it.

Owns: its start, its end, telling of one that ended too early. Does not own: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from pipelines.stopping import cancelled


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], ended: Callable[[str], None]) -> AsyncIterator[None]:
    """Does work beside what is within; `ended` is told why it ended where it should not have."""

    def look(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            ended(f"{type(error).__name__}: {error}")

    task = asyncio.create_task(work)
    task.add_done_callback(look)
    try:
        yield
    finally:
        await cancelled([task])
