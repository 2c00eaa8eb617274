"""Peak memory counts what this process started, and its Ray node."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray

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


def test_a_raylet_is_counted_only_where_it_is_of_the_cluster_that_was_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stand-ins that bear a raylet's name and arguments, of two clusters."""
    code = "import sys, ctypes; ctypes.CDLL(None).prctl(15, b'raylet'); "
    code += f"block = b'x' * {HOLDS}; print('held', flush=True); input()"
    started = [
        subprocess.Popen(
            ["setsid", "--fork", sys.executable, "-c", code, f"--gcs-address=127.0.0.1:{port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for port in (1, 2)
    ]
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == b"held\n"
        with PeakMemory() as alone:
            pass
        joined = SimpleNamespace(gcs_address="127.0.0.1:1")
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: joined)
        with PeakMemory() as with_one:
            pass
    finally:
        for one in started:
            one.communicate(b"\n", timeout=30)
    assert 0.8 * HOLDS < with_one.peak_bytes - alone.peak_bytes < 1.8 * HOLDS
