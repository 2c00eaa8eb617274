"""Work that may hang for good, as reading from a file server that does not answer, on a thread of its own.

Owns: the thread. Does not own: deadlines (deadline.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_own_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the work gives. Neither the end of the event loop nor that of the process waits for it, as they do for
    those of asyncio.to_thread."""
    future = Future[T]()
    future.set_running_or_notify_cancel()  # from now on it takes a result, whether or not somebody waits for it

    def run() -> None:
        try:
            result = work(*args, **kwargs)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=run, name=getattr(work, "__qualname__", "work"), daemon=True).start()
    return await asyncio.wrap_future(future)
