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
from collections.abc import Callable
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
SHARED_MEMORY, SHARED_EVERY_S = "/dev/shm/", 0.5


class FaultyRun:
    """The GRPO stage as a user starts it.

    Args:
        folder: the run folder that it writes.
        arguments: overrides.
    """

    def __init__(self, folder: Path, arguments: list[str], timeout_s: float = 300) -> None:
        self.folder, self._deadline = folder, time.monotonic() + timeout_s
        self._shared, self._shared_at = set[str](), 0.0
        self._seen: dict[int, psutil.Process] = {}
        place = [f"run.root={folder.parent}", f"run.name={folder.name}"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.grpo", "-c", "configs/quickstart.yaml", *arguments, *place],
                cwd=PROJECT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._driver = psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for process in self._seen.values():
            if process.is_running() and kind is not None:
                process.kill()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file of the journal."""
        path = self.folder / "journal" / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def wait_for(self, condition: Callable[[], Any], pause_s: float = 0.05) -> Any:
        """What the condition says once it holds. Raises AssertionError when the run ends before, or is late."""
        while not (found := condition()):
            self._look()
            assert self._process.poll() is None, f"the run ended before:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < self._deadline, f"waited in vain:\n{self.log.read_text()[-3000:]}"
            time.sleep(pause_s)
        return found

    def actor(self, role: str, during: str | None = None) -> psutil.Process | None:
        """The process of an actor of a role, one that does what is named."""
        name = f"ray::{CLASSES[role]}" + (f".{during}" if during else "")
        found = [each for each in self._look() if title(each) == name or (not during and title(each).startswith(name))]
        return found[0] if found else None

    def signal(self, role: str, sent: signal.Signals, during: str | None = None) -> int:
        """Sends a signal to the actor of a role as soon as it does what is named; its process id."""
        process = self.wait_for(lambda: self.actor(role, during), pause_s=0.002)
        process.send_signal(sent)
        return int(process.pid)

    def finish(self) -> str:
        """Waits for the end of the run; what it said. Raises AssertionError where it failed."""
        said = self._wait()
        assert self._process.returncode == 0, said[-4000:]
        return said

    def finish_badly(self) -> dict[str, Any]:
        """Waits for the end of a run that must fail; its report."""
        said = self._wait()
        assert self._process.returncode == 1 and "report: " in said, said[-4000:]
        report: dict[str, Any] = json.loads((self.folder / "failure.json").read_text())
        return report

    def _wait(self) -> str:
        while self._process.poll() is None:
            self._look()
            assert time.monotonic() < self._deadline, f"the run is late:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)
        return self.log.read_text()

    def leftovers(self) -> list[str]:
        """Processes of the run, and files in shared memory, that are still there some seconds after its end."""
        deadline = time.monotonic() + 15
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _left(self) -> list[str]:
        alive = [process for process in self._seen.values() if process.is_running() and not is_zombie(process)]
        shared = sorted(path for path in self._shared if Path(path).exists())
        return [f"{process.pid} {title(process)}" for process in alive] + shared

    def _look(self) -> list[psutil.Process]:
        """The descendants of the run, each remembered."""
        try:
            found = self._driver.children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        for process in found:
            self._seen.setdefault(process.pid, process)
        if time.monotonic() - self._shared_at > SHARED_EVERY_S:
            self._shared_at = time.monotonic()
            self._shared.update(path for process in found for path in shared_memory(process.pid))
        return found


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


def title(process: psutil.Process) -> str:
    """What Ray calls a process; "" for one that has gone."""
    try:
        return (process.cmdline() or [""])[0].split(" ")[0]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


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
