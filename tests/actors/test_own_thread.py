"""Work that hangs keeps neither the event loop nor the process from its end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from actors.own_thread import in_own_thread


def test_it_gives_what_the_work_gives_or_raises() -> None:
    def broken() -> None:
        raise OSError("Stale file handle")

    async def run() -> None:
        assert await in_own_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(OSError, match="Stale file handle"):
            await in_own_thread(broken)

    asyncio.run(run())


@pytest.mark.parametrize("is_late", [False, True])
def test_the_loop_ends_without_it(is_late: bool) -> None:
    threads, end = list[threading.Thread](), threading.Event()

    def hangs() -> None:
        threads.append(threading.current_thread())
        end.wait(20)

    async def run() -> None:
        if is_late:
            async with asyncio.timeout(0.1):
                await in_own_thread(hangs)
        else:
            task = asyncio.create_task(in_own_thread(hangs))
            await asyncio.sleep(0.1)
            assert not task.done()

    began = time.monotonic()
    if is_late:
        with pytest.raises(TimeoutError):
            asyncio.run(run())
    else:
        asyncio.run(run())
    assert time.monotonic() - began < 10
    (thread,) = threads
    assert thread.is_alive() and thread.daemon, "nor does the process wait for it"
    end.set()
    thread.join(10)
    assert not thread.is_alive()
