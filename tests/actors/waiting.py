"""A wait for something that nobody tells of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], bool], what: Any = "", limit_s: float = 120.0) -> None:
    """Returns when a condition holds.

    Args:
        what: of the error where it does not in time; called for it where it can be.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, what() if callable(what) else what
        await asyncio.sleep(0.005)
