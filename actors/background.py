"""Tasks that nobody awaits.

Owns: that one which ends with an error is told of. Does not own: what the work is, or when it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


def in_background(
    work: Coroutine[Any, Any, None], ended: Callable[[str], None], name: str | None = None
) -> asyncio.Task[None]:
    """Starts work; `ended` is told why it ended where it raised."""

    def look(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            ended(f"{type(error).__name__}: {error}")

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(look)
    return task
