"""Peak memory of this process and all it started, sampled while something runs; how often garbage is looked for."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SAMPLE_EVERY_S = 4.0
SAMPLE_SHARE = 0.005
"""Of a core, at most: the kernel walks all pages of a process for its proportional set size."""
COLLECT_EVERY = 20_000


@contextmanager
def rare_collections() -> Iterator[None]:
    """Within it the garbage collector runs every COLLECT_EVERY new objects, not every 700.

    The driver holds thousands of groups under way, none of them garbage: looking through them again and again took
    more than half of its CPU time.
    """
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class PeakMemory:
    """Context manager; `peak_bytes` is the largest sum of proportional set sizes (memory shared by several processes
    counted once) over this process, its descendants, and the Ray workers of this machine, which descend from the
    cluster that a driver joined. Other machines are not in it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = _sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause_s = SAMPLE_EVERY_S
        while not self._stop.wait(pause_s):
            began = time.thread_time()
            self.peak_bytes = max(self.peak_bytes, _sample())
            pause_s = max(SAMPLE_EVERY_S, (time.thread_time() - began) / SAMPLE_SHARE)


def _sample() -> int:
    me = psutil.Process()
    workers = [process for process in psutil.process_iter(["name"]) if (process.info["name"] or "").startswith("ray::")]
    total = 0
    for process in {me, *me.children(recursive=True), *workers}:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
