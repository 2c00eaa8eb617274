"""Lets the wall clock of every Python process that has this folder in PYTHONPATH run apart from that of the machine, by
the seconds that the file $SKEW_FILE holds. The monotonic clock stays, as it does where a machine's clock is set."""

from __future__ import annotations

import os
import time

REREAD_S = 0.05
_time, _time_ns = time.time, time.time_ns
_skew, _read_at = 0.0, -1.0


def skew() -> float:
    """Seconds that the clock is ahead."""
    global _skew, _read_at
    if time.monotonic() - _read_at > REREAD_S:
        _read_at = time.monotonic()
        try:
            with open(os.environ["SKEW_FILE"]) as file:
                _skew = float(file.read() or 0.0)
        except (OSError, KeyError):
            _skew = 0.0
    return _skew


time.time = lambda: _time() + skew()
time.time_ns = lambda: _time_ns() + int(skew() * 1e9)
