"""Peak memory of this process and all it started, sampled while something runs."""

from __future__ import annotations

import threading

import psutil

SAMPLE_EVERY_S = 2.0


class PeakMemory:
    """Context manager; `peak_bytes` is the largest sum of proportional set sizes (memory shared by several processes
    counted once) over this process and its descendants. Remote nodes of a cluster are not in it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, _sample())
            if self._stop.wait(SAMPLE_EVERY_S):
                return


def _sample() -> int:
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
