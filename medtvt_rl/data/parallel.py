"""Runs a function over many items in a few processes, in order, with progress.

Owns: the pool. Does not own: what is run. Processes are spawned, never forked: a fork of a process that holds threads
(torch, Ray) can hang. They leave an interruption to the process that started them, and end when that one does.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from medtvt_rl.data.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of the container that this process is in: microseconds of CPU, or `max`, in a period of so many."""
_WORTH_A_POOL = 96
_CHUNK = 16
_CHUNKS_UNDER_WAY = 3


def ordered_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Yields function(item) in the order of the items; `function` must be importable by name.

    No more than a few chunks a process are under way, so that memory doesn't follow the number of items.

    Args:
        num_workers: processes; 0 means one per usable core. Few items, or one worker, run in this process.
        progress: called with (done, total) after each item.

    Raises:
        DataError: a process died, for want of memory as a rule.
    """
    num_workers = num_workers or usable_cores()
    if num_workers == 1 or len(items) < _WORTH_A_POOL:
        results: Iterator[Result] = map(function, items)
    else:
        results = _in_processes(function, items, num_workers)
    for done, result in enumerate(results, 1):
        if progress:
            progress(done, len(items))
        yield result


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's quota is worth."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return min(bound, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is none
        return bound


def _in_processes(function: Callable[[Item], Result], items: Sequence[Item], num_workers: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_prepare_process)
    chunks = (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
    under_way: deque = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_run_chunk, function, chunk))
            if len(under_way) >= _CHUNKS_UNDER_WAY * num_workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "data.num_workers: a reading process was killed, for want of memory as a rule; "
            f"try again with fewer than {num_workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chunk(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
