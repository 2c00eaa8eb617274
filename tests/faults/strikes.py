"""A signal to an actor at a chosen phase of a run, and what the way back costs.

    strikes = Strikes(run, table)
    strikes.at_phase("learner", signal.SIGKILL, "backward")

A phase is seen from outside, by the titles of the processes. Where the one that is struck is the one whose phase it is,
it is stopped first and looked at again, so that it is struck in the midst of it.

Owns: phases, the strike, the measurement. Does not own: the run (harness.py), which strikes there are (the tests).
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fault_table import FINE, FaultTable, Row
from harness import CLASSES, FaultyRun, title

PHASES = {
    "generating": ("rollout", "generate"),
    "scoring": ("reward", "score"),
    "reference": ("reference", "logprobs"),
    "forward": ("learner", "train_step forward"),
    "backward": ("learner", "train_step backward"),
    "optimizer step": ("learner", "train_step optimizer step"),
    "before publishing": ("learner", "export"),
    "publishing": ("rollout", "update_weights"),
    "after publishing": ("learner", "score"),
}
"""By name: the role whose phase it is, and what its process says then."""
NOT_SERVING = ("__init__", "warm", "health")
LISTED_EVERY_S, LOOK_EVERY_S = 0.5, 0.0005
SEEN_WITHIN_S, RECOVERED_WITHIN_S = 300.0, 600.0
MAX_NEAR_MISSES = 200


class Strikes:
    """What is done to a run, with a row of the table for each."""

    def __init__(self, run: FaultyRun, table: FaultTable) -> None:
        self._run, self._table = run, table
        self._actors: list[tuple[str, int]] = []
        self._listed_at = 0.0
        self._serving: dict[str, int] = {}
        self.rows: list[Row] = []

    def at_phase(self, role: str, sent: signal.Signals, phase: str) -> Row:
        """Strikes the actor of a role while the run is at a phase."""
        return self._struck(role, sent, phase, lambda: self._catch(role, *PHASES[phase]))

    def in_checkpoint(self, role: str, sent: signal.Signals, share: float, usual_s: float) -> Row:
        """Strikes the actor of a role when so much of the time has passed that writing a checkpoint usually takes."""

        def catch() -> int:
            target = self.serving(role)
            self._run.wait_for(lambda: not being_written(self._run.folder), LOOK_EVERY_S, SEEN_WITHIN_S)
            self._run.wait_for(lambda: being_written(self._run.folder), LOOK_EVERY_S, SEEN_WITHIN_S)
            time.sleep(share * usual_s)
            return target

        return self._struck(role, sent, f"checkpoint, {share:.0%} of its time", catch)

    def at_once(self, role: str) -> int:
        """SIGKILL to the actor that serves, or is about to; its process id."""
        target = self.serving(role)
        os.kill(target, signal.SIGKILL)
        return target

    def serving(self, role: str) -> int:
        """The process of the actor that serves, which is told from a spare by what it does."""

        def found() -> int | None:
            self._look()
            pid = self._serving.get(role)
            return pid if pid is not None and title(pid) else None

        return int(self._run.wait_for(found, LOOK_EVERY_S, RECOVERED_WITHIN_S))

    def measured(self, fault: str, phase: str, strike: Callable[[], object], role: str | None) -> Row:
        """Strikes, and waits until what was lost serves again and a step was done with it; role None: nothing is
        replaced, the run goes on."""
        run = self._run
        incidents, lost, repeated = len(run.rows("events")), len(run.rows("discarded")), count_repeated(run)
        verdict, seconds = FINE, None
        strike()
        struck_at = time.monotonic()
        if role is not None:
            event = run.wait_for(lambda: self._incident(incidents, role), within_s=RECOVERED_WITHIN_S)
            seconds = time.monotonic() - struck_at
            verdict = FINE if event["outcome"] == "replaced" else event["outcome"]
        steps = len(run.rows("steps"))
        run.wait_for(lambda: len(run.rows("steps")) > steps, within_s=RECOVERED_WITHIN_S)
        row = Row(
            fault=fault,
            phase=phase,
            seconds=seconds,
            lost=len(run.rows("discarded")) - lost,
            repeated=count_repeated(run) - repeated,
            verdict=verdict,
        )
        self.rows.append(row)
        return self._table.add(row)

    def _incident(self, after: int, role: str) -> dict[str, object] | None:
        return next((event for event in self._run.rows("events")[after:] if event["role"] == role), None)

    def _struck(self, role: str, sent: signal.Signals, phase: str, catch: Callable[[], int]) -> Row:
        target = catch()
        return self.measured(f"{sent.name} {role}", phase, lambda: os.kill(target, sent), role)

    def _catch(self, role: str, holder: str, call: str) -> int:
        """Waits for a phase; the process to strike, stopped already where it is the one whose phase it is."""
        target, misses = self.serving(role), 0
        name = f"ray::{CLASSES[holder]}.{call}"
        at = 0

        def reached() -> bool:
            nonlocal at
            self._look()
            at = next((pid for kind, pid in self._actors if kind == holder and title(pid) == name), 0)
            return at > 0

        while True:
            self._run.wait_for(reached, LOOK_EVERY_S, SEEN_WITHIN_S)
            if holder != role:
                return target
            if stopped_at(at, name) or misses > MAX_NEAR_MISSES:
                return at
            misses += 1

    def _look(self) -> None:
        """Which actors there are, and which of them serve."""
        if time.monotonic() - self._listed_at > LISTED_EVERY_S:
            self._listed_at = time.monotonic()
            roles = {f"ray::{name}": role for role, name in CLASSES.items()}
            named = [(title(process.pid).split(".")[0].split(" ")[0], process.pid) for process in self._run.processes()]
            self._actors = [(roles[name], pid) for name, pid in named if name in roles]
        for role, pid in self._actors:
            _, _, call = title(pid).partition(".")
            if call and call.split(" ")[0] not in NOT_SERVING:
                self._serving[role] = pid


def stopped_at(pid: int, name: str) -> bool:
    """Stops a process; goes on with it, and False, where it is at something else by now."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 1
    while state(pid) not in ("T", "") and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    if title(pid) == name:
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def state(pid: int) -> str:
    """One letter; "" for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def being_written(folder: Path) -> list[Path]:
    """The checkpoint that is being written, if one is."""
    return list((folder / "checkpoints").glob(".step_*.writing"))


def count_repeated(run: FaultyRun) -> int:
    """Groups that were trained on more than once, each time but the first."""
    times = Counter(group["group_id"] for group in run.rows("groups"))
    return sum(times.values()) - len(times)
