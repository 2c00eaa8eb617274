"""Peak memory counts what this process started."""

from __future__ import annotations

import subprocess
import sys

from pipelines.memory import PeakMemory

HOLDS = 200 << 20


def test_a_child_that_holds_memory_is_counted_and_the_peak_outlives_it() -> None:
    code = f"block = b'x' * {HOLDS}; print('held', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with PeakMemory() as during:
        child.communicate(b"\n", timeout=30)
    with PeakMemory() as after:
        pass
    assert during.peak_bytes - after.peak_bytes > 0.8 * HOLDS
