"""Work that goes on beside other work, and ends with it.

Owns: its start, its end, telling of one that ended too early. Does not own: what the work is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from actors.background import in_background
from pipelines.stopping import cancelled


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], ended: Callable[[str], None]) -> AsyncIterator[None]:
    """Does work beside what is within; `ended` is told why it ended where it should not have."""
    task = in_background(work, ended)
    try:
        yield
    finally:
        await cancelled([task])
