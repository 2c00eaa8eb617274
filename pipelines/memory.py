"""Peak memory of this process and all it started, sampled while something runs; how often garbage is looked for."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SAMPLE_EVERY_S = 4.0
SAMPLE_SHARE, SAMPLE_AT_FIRST_S = 0.005, 1.0
"""Of a core, at most, after so many seconds of it, which short runs need to be seen at their peak: the kernel walks all
pages of a process for its proportional set size."""
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
    counted once) over this process, its descendants, and what descends from the Ray node of this machine where the
    driver joined a cluster, which other jobs of that cluster share. Other machines and clusters are not in it."""

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
        began, pause_s = time.monotonic(), SAMPLE_EVERY_S
        while not self._stop.wait(pause_s):
            self.peak_bytes = max(self.peak_bytes, _sample())
            due_s = (time.thread_time() - SAMPLE_AT_FIRST_S) / SAMPLE_SHARE
            pause_s = max(SAMPLE_EVERY_S, due_s - (time.monotonic() - began))


def _sample() -> int:
    total = 0
    for process in {each for root in _roots() for each in (root, *_descendants(root))}:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _roots() -> Iterator[psutil.Process]:
    """This process, and the raylet of this machine in the cluster that it is part of."""
    yield psutil.Process()
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ours = f"--gcs-address={ray.get_runtime_context().gcs_address}"
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "raylet" and ours in (process.info["cmdline"] or ()):
                yield process


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
