"""Where the time of the loop goes, step by step.

Owns: the phases of a step, which follow one another and add up to its seconds; what runs beside them; when nobody asked
a role. Does not own: what the roles themselves tell (step_metrics.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PHASES = ("probe", "conclude", "checkpoint", "wait_groups", "train", "publish")


@dataclass(slots=True, kw_only=True)
class _Asked:
    """A role: calls under way, idle seconds of this step, and since when it is idle if there is no call."""

    calls: int = 0
    idle_s: float = 0.0
    since: float


class StepClock:
    """Seconds of one step after the other. A step begins where the one before ended: with its weights published.

    Attributes:
        seconds: metrics of the step under way so far.
    """

    def __init__(self) -> None:
        self._roles: dict[str, _Asked] = {}
        self._began = _now()
        self._lap = self._began[0]
        self.seconds = _no_seconds()

    def lap(self, phase: str) -> float:
        """Ends a phase; its seconds."""
        return self._lap_at(phase, time.monotonic())

    def end(self, phase: str) -> dict[str, float]:
        """Ends the step with its last phase: its metrics. All that comes is of the next step."""
        ended = _now()
        self._lap_at(phase, ended[0])
        wall_s, loop_s, driver_s = (end - start for start, end in zip(self._began, ended))
        whole = {"seconds/step": wall_s, "seconds/loop_cpu": loop_s, "seconds/driver_cpu": driver_s}
        idle = {f"seconds/{name}_idle": _take_idle(role, ended[0]) for name, role in self._roles.items()}
        told = self.seconds | whole | idle
        self._began, self.seconds = ended, _no_seconds()
        return told

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Adds what happens inside to seconds/NAME of the step in which it ends, beside the phases."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._add(name, time.monotonic() - started)

    @contextmanager
    def asked(self, role: str) -> Iterator[None]:
        """A call of a role; where none is under way, that counts as seconds/ROLE_idle."""
        known = self._roles.setdefault(role, _Asked(since=self._began[0]))
        if not known.calls:
            known.idle_s += time.monotonic() - known.since
        known.calls += 1
        try:
            yield
        finally:
            known.calls -= 1
            if not known.calls:
                known.since = time.monotonic()

    def _lap_at(self, phase: str, now: float) -> float:
        passed, self._lap = now - self._lap, now
        self._add(phase, passed)
        return passed

    def _add(self, name: str, passed: float) -> None:
        self.seconds[f"seconds/{name}"] = self.seconds.get(f"seconds/{name}", 0.0) + passed


def _no_seconds() -> dict[str, float]:
    return {f"seconds/{name}": 0.0 for name in (*PHASES, "wait_slots")}


def _take_idle(role: _Asked, now: float) -> float:
    if not role.calls:
        role.idle_s += now - role.since
        role.since = now
    idle_s, role.idle_s = role.idle_s, 0.0
    return idle_s


def _now() -> tuple[float, float, float]:
    """Wall clock, CPU of this thread, CPU of this process with Ray's threads and all else."""
    return time.monotonic(), time.thread_time(), time.process_time()
