"""A signal to an actor at a chosen phase of a run, and what the way back costs.

    strikes = Strikes(run, table)
    strikes.at_phase(["learner"], signal.SIGKILL, "backward")
    strikes.at_phase(["rollout", "reward", "reference"], signal.SIGSTOP, "backward")  # at once, a row for each

A phase is seen from outside, by the titles of the processes. Where the one that is struck is the one whose phase it is,
it is stopped first and looked at again, so that it is struck in the midst of it.

Owns: phases, the strike, the measurement. Does not own: the run (harness.py), which strikes there are (the tests).
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

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
    """What is done to a run, with a row of the table for each.

    Args:
        remark: behind the phase in every row, where the run is another than usual.
    """

    def __init__(self, run: FaultyRun, table: FaultTable, remark: str = "") -> None:
        self._run, self._table, self._remark = run, table, remark
        self._actors: list[tuple[str, int]] = []
        self._listed_at = 0.0
        self._serving: dict[str, int] = {}
        self.rows: list[Row] = []

    def at_phase(self, roles: Sequence[str], sent: signal.Signals, phase: str) -> None:
        """Strikes one actor of each role, all at once, while the run is at a phase."""
        self._struck(roles, sent, lambda: (phase, self._catch(roles, *PHASES[phase])))

    def in_checkpoint(self, roles: Sequence[str], sent: signal.Signals, share: float, usual_s: float) -> None:
        """The same when so much of the time has passed that writing a checkpoint usually takes."""

        def catch() -> tuple[str, dict[str, int]]:
            targets = {role: self.serving(role) for role in roles}
            self._run.wait_for(lambda: not being_written(self._run.folder), LOOK_EVERY_S, SEEN_WITHIN_S)
            self._run.wait_for(lambda: being_written(self._run.folder), LOOK_EVERY_S, SEEN_WITHIN_S)
            time.sleep(share * usual_s)
            moment = "checkpoint" if being_written(self._run.folder) else "just after a checkpoint"
            return f"{moment}, at {share:.0%} of its usual time", targets

        self._struck(roles, sent, catch)

    def at_once(self, role: str) -> int:
        """SIGKILL to the actor that serves, or is about to; its process id."""
        while not sent_to(target := self.serving(role), signal.SIGKILL):
            self._serving.pop(role, None)
        return target

    def serving(self, role: str) -> int:
        """The process of the actor that serves, which is told from a spare by what it does."""

        def found() -> int | None:
            self._look()
            pid = self._serving.get(role)
            return pid if pid is not None and title(pid) else None

        return int(self._run.wait_for(found, LOOK_EVERY_S, RECOVERED_WITHIN_S))

    def measured(self, fault: str, phase: str, strike: Callable[[], object], role: str | None) -> None:
        """Strikes, and waits until what was lost serves again and a step was done with it; role None: nothing is
        replaced, the run goes on."""

        def struck() -> tuple[str, list[str]]:
            strike()
            return phase, [] if role is None else [role]

        self._measured(struck, lambda _: fault)

    def _measured(self, strike: Callable[[], tuple[str, Sequence[str]]], name: Callable[[str], str]) -> None:
        """The rows of one strike: one for each role that lost an actor, or a single one.

        Args:
            strike: f() -> the phase, and the roles that lost an actor.
            name: f(role) -> what befell it.
        """
        run = self._run
        incidents, lost, repeated = len(run.rows("events")), len(run.rows("discarded")), count_repeated(run)
        phase, roles = strike()
        struck_at = time.monotonic()
        back: dict[str, tuple[float, str]] = {}

        def all_back() -> bool:
            for role in roles:
                event = self._incident(incidents, role)
                if role not in back and event is not None:
                    back[role] = time.monotonic() - struck_at, str(event["outcome"])
            return len(back) == len(roles)

        run.wait_for(all_back, within_s=RECOVERED_WITHIN_S)
        steps = len(run.rows("steps"))
        run.wait_for(lambda: len(run.rows("steps")) > steps, within_s=RECOVERED_WITHIN_S)
        for role in roles or [""]:
            seconds, outcome = back.get(role, (None, "replaced"))
            row = Row(
                fault=name(role),
                phase=phase + self._remark,
                seconds=seconds,
                lost=len(run.rows("discarded")) - lost,
                repeated=count_repeated(run) - repeated,
                verdict=FINE if outcome == "replaced" else outcome,
            )
            self.rows.append(self._table.add(row))

    def _incident(self, after: int, role: str) -> dict[str, object] | None:
        return next((event for event in self._run.rows("events")[after:] if event["role"] == role), None)

    def _struck(
        self, roles: Sequence[str], sent: signal.Signals, catch: Callable[[], tuple[str, dict[str, int]]]
    ) -> None:
        """Args: catch: f() -> the phase, and the process of each role."""

        def strike() -> tuple[str, Sequence[str]]:
            while True:
                phase, targets = catch()
                struck = [role for role, target in targets.items() if sent_to(target, sent)]
                if struck:  # else all of them had been replaced meanwhile
                    return phase, struck

        def name(role: str) -> str:
            others = [other for other in roles if other != role]
            return f"{sent.name} {role}" + (f" (with {', '.join(others)})" if others else "")

        self._measured(strike, name)

    def _catch(self, roles: Sequence[str], holder: str, call: str) -> dict[str, int]:
        """Waits for a phase; the processes to strike, stopped already the one whose phase it is."""
        targets, misses = {role: self.serving(role) for role in roles}, 0
        name = f"ray::{CLASSES[holder]}.{call}"
        at = 0

        def reached() -> bool:
            nonlocal at
            self._look()
            at = next((pid for kind, pid in self._actors if kind == holder and title(pid) == name), 0)
            return at > 0

        while True:
            self._run.wait_for(reached, LOOK_EVERY_S, SEEN_WITHIN_S)
            if holder not in roles:
                return targets
            if stopped_at(at, name):
                return {**targets, holder: at}
            misses += 1
            assert misses < MAX_NEAR_MISSES, f"{name} could not be met"

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


def sent_to(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; False where the process has gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def stopped_at(pid: int, name: str) -> bool:
    """Stops a process; goes on with it, and False, where it is at something else by now."""
    if not sent_to(pid, signal.SIGSTOP):
        return False
    deadline = time.monotonic() + 1
    while state(pid) not in ("T", "") and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    if title(pid) == name:
        return True
    sent_to(pid, signal.SIGCONT)
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


def how_long_writing_takes(run: FaultyRun) -> float:
    """The median of three checkpoints, seconds."""
    found = []
    for _ in range(3):
        run.wait_for(lambda: being_written(run.folder), pause_s=0.001)
        began = time.monotonic()
        run.wait_for(lambda: not being_written(run.folder), pause_s=0.001)
        found.append(time.monotonic() - began)
    return median(found)


def count_repeated(run: FaultyRun) -> int:
    """Groups that were trained on more than once, each time but the first."""
    times = Counter(group["group_id"] for group in run.rows("groups"))
    return sum(times.values()) - len(times)
