"""Runs a function over many items in a few processes, in order, with progress.

Owns: the pool. Does not own: what is run. Processes are spawned, never forked: a fork of a process that holds threads
(torch, Ray) can hang.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

_WORTH_A_POOL = 96
_CHUNK = 16


def ordered_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Yields function(item) in the order of the items; `function` must be importable by name.

    Args:
        num_workers: processes; 0 means one per usable core. Few items, or one worker, run in this process.
        progress: called with (done, total) after each item.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    total = len(items)
    if num_workers == 1 or total < _WORTH_A_POOL:
        for done, item in enumerate(items, 1):
            result = function(item)
            if progress:
                progress(done, total)
            yield result
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        for done, result in enumerate(pool.imap(function, items, _CHUNK), 1):
            if progress:
                progress(done, total)
            yield result
