"""A run in a process of its own, what is done to its actors while it goes, and what must hold of its folder afterwards.

    with FaultyRun(arguments) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 2)
        run.signal("learner", signal.SIGKILL, during="train_step")
        run.finish()
    audit(run, steps=8, groups_per_step=4, max_staleness=0)

An actor's process is found by the title that Ray gives it, ray::CLASS.METHOD, among the descendants of the run.
Learners and generators may have spares of the same class: what it does tells the one that serves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PROJECT = Path(__file__).parents[2]
CLASSES = {
    "rollout": "RolloutGenerator",
    "reward": "RewardScorer",
    "reference": "ReferencePolicy",
    "learner": "LearnerWorker",
}
SHARED_MEMORY, SHARED_EVERY_S = "/dev/shm/", 3.0


class FaultyRun:
    """The GRPO stage as a user starts it.

    Args:
        folder: the run folder that it writes.
        arguments: overrides.
        prefix: what its command line begins with, e.g. `ip netns exec NAME`.
        environment: variables beside those of this process.
        log: the file of what it prints; None: beside the folder.
        roots: processes, besides its own, whose descendants belong to it: the nodes of a cluster that it joins.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        timeout_s: float = 300,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        roots: Callable[[], list[psutil.Process]] | None = None,
        log: Path | None = None,
    ) -> None:
        self.folder, self._deadline = folder, time.monotonic() + timeout_s
        self._shared, self._shared_at = set[str](), 0.0
        self._seen: dict[int, psutil.Process] = {}
        self._read: dict[str, tuple[int, list[dict[str, Any]]]] = {}
        place = [f"run.root={folder.parent}", f"run.name={folder.name}"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = log or folder.parent / f"{folder.name}.log"
        with self.log.open("a") as log:
            self._said_from = log.tell()
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "pipelines.grpo", "-c", "configs/quickstart.yaml", *arguments, *place],
                cwd=PROJECT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.driver, self._roots = psutil.Process(self._process.pid), roots

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.processes()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for process in self._seen.values():
            if process.is_running() and kind is not None:
                process.kill()

    # What it has written.

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_bytes()[self._said_from :].decode(errors="replace")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file of the journal."""
        return self._rows(self.folder / "journal" / f"{name}.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return self._rows(self.folder / "metrics.jsonl")

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        """Only what was added is read: a long run is looked at often."""
        start, rows = self._read.get(path.name, (0, []))
        if path.is_file():
            if path.stat().st_size < start:  # it was written anew
                start, rows = 0, []
            with path.open("rb") as file:
                file.seek(start)
                added = file.read()
            added = added[: added.rfind(b"\n") + 1]
            rows = rows + [json.loads(line) for line in added.splitlines()]
            self._read[path.name] = (start + len(added), rows)
        return rows

    # What it is doing.

    def wait_for(self, condition: Callable[[], Any], pause_s: float = 0.05, within_s: float = 1e9) -> Any:
        """What the condition says once it holds. Raises AssertionError when the run ends before, or is late."""
        deadline = min(self._deadline, time.monotonic() + within_s)
        while not (found := condition()):
            assert self._process.poll() is None, f"the run ended before:\n{self.said[-3000:]}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.said[-3000:]}"
            self._look_at_memory()
            time.sleep(pause_s)
        return found

    def actor(self, role: str, during: str | None = None) -> psutil.Process | None:
        """The process of an actor of a role, one that does what is named."""
        name = f"ray::{CLASSES[role]}" + (f".{during}" if during else "")
        for each in self.processes():
            does = title(each.pid)
            if does == name or does.startswith(f"{name} " if during else name):
                return each
        return None

    def signal(self, role: str, sent: signal.Signals, during: str | None = None) -> int:
        """Sends a signal to the actor of a role as soon as it does what is named; its process id."""
        process = self.wait_for(lambda: self.actor(role, during), pause_s=0.002)
        process.send_signal(sent)
        return int(process.pid)

    def processes(self) -> list[psutil.Process]:
        """Those of the run, each remembered."""
        found = []
        for root in [self.driver, *(self._roots() if self._roots else ())]:
            try:
                found += root.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
        for process in found:
            self._seen.setdefault(process.pid, process)
        return found

    def _look_at_memory(self) -> None:
        if time.monotonic() - self._shared_at > SHARED_EVERY_S:
            self._shared_at = time.monotonic()
            self._shared.update(path for process in self.processes() for path in shared_memory(process.pid))

    # How it ends.

    def finish(self) -> str:
        """Waits for the end of the run; what it said. Raises AssertionError where it failed."""
        said = self.wait()
        assert self._process.returncode == 0, said[-4000:]
        return said

    def finish_badly(self) -> dict[str, Any]:
        """Waits for the end of a run that must fail; its report."""
        said = self.wait()
        assert self._process.returncode == 1 and "report: " in said, said[-4000:]
        report: dict[str, Any] = json.loads((self.folder / "failure.json").read_text())
        return report

    def stop(self, grace_s: float | None = None) -> int:
        """Asks it to end, and kills it after the grace; its exit code."""
        self.processes()
        self._process.terminate()
        if grace_s is not None:
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self.wait()
        return int(self._process.returncode)

    def kill(self) -> None:
        """SIGKILL to the driver."""
        self.processes()
        self._process.kill()
        self._process.wait()

    def wait(self) -> str:
        """Waits for its end, however it ends; what it said."""
        while self._process.poll() is None:
            assert time.monotonic() < self._deadline, f"the run is late:\n{self.said[-3000:]}"
            self._look_at_memory()
            time.sleep(0.2)
        return self.said

    def leftovers(self, within_s: float = 15) -> list[str]:
        """Processes of the run, and files in shared memory, that are still there some seconds after its end."""
        deadline = time.monotonic() + within_s
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _left(self) -> list[str]:
        alive = [process for process in self._seen.values() if process.is_running() and not is_zombie(process)]
        if self._roots is not None:  # what Ray keeps for every node belongs to the cluster
            alive = [process for process in alive if title(process.pid).startswith("ray::") and not is_ray_s(process)]
        shared = sorted(path for path in self._shared if Path(path).exists())
        return [f"{process.pid} {title(process.pid)}" for process in alive] + shared


def audit(run: FaultyRun, steps: int, groups_per_step: int, max_staleness: int) -> None:
    """What must hold of a run that ended well, whatever befell it."""
    lines, groups = run.rows("steps"), run.rows("groups")
    assert [line["step"] for line in lines] == list(range(steps)), "every step once, in order"
    times = Counter(group["group_id"] for group in groups)
    assert set(times.values()) == {1} and len(times) == steps * groups_per_step, "every group exactly once"
    given_up = {row["group_id"] for row in run.rows("discarded")}
    assert not given_up, f"groups were lost: {given_up}"
    assert set(times) == set(range(len(times))), "no group was left out"
    assert all(0 <= group["step"] - group["oldest_version"] <= max_staleness for group in groups)
    assert run.leftovers() == []


def title(pid: int) -> str:
    """What Ray calls a process; "" for one that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 1)[0].decode(errors="replace").rstrip()
    except OSError:
        return ""


def is_ray_s(process: psutil.Process) -> bool:
    """Whether it is of the node, not of a run: it serves the node, or waits for an actor that it may become."""
    return title(process.pid) in ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def shared_memory(pid: int) -> set[str]:
    """Files in shared memory that a process has mapped; others on the machine have some of their own."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line[line.index(SHARED_MEMORY) :].removesuffix(" (deleted)") for line in lines if SHARED_MEMORY in line}
