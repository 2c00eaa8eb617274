"""Two machines and a wire between them, made of network namespaces; Ray nodes are started on them, and lost again.

    with TwoMachines(folder) as machines:
        machines.add("far", on="second")
        machines.cut(); machines.mend(); machines.kill("far")

Needs root and `ip`. Owns: the namespaces, the wire, Ray's processes of each node. Does not own: the run on them
(harness.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ADDRESSES = {"first": "10.231.77.1", "second": "10.231.77.2"}
PORT, START_S, STORE_BYTES = 6399, 240.0, 200 << 20
# Every value lies in the memory of the node that made it, however small; a dead node is noticed as by default.
SYSTEM = {"max_direct_call_object_size": 0}


def why_not() -> str:
    """Why there can be no namespaces here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (Debian: iproute2)"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made.stderr.strip()


class TwoMachines:
    """Ray's head on the first machine; other nodes come and go on either.

    Args:
        folder: where Ray keeps its things; its path must be short, for sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, f"f{os.getpid() % 100000}"
        self._raylets: dict[str, psutil.Process] = {}
        self._started: list[psutil.Process] = []

    @property
    def address(self) -> str:
        """Of the cluster, from the first machine."""
        return f"{ADDRESSES['first']}:{PORT}"

    @property
    def prefix(self) -> list[str]:
        """What a command on the first machine begins with."""
        return ["ip", "netns", "exec", self._space("first")]

    def __enter__(self) -> Self:
        first, second = self._space("first"), self._space("second")
        for space in (first, second):
            _ip("netns", "add", space)
        _ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        for name, space in (("first", first), ("second", second)):
            _ip("-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "wire")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "wire", "up")
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        self._start("head", "first", 4, [*head, f"--system-config={json.dumps(SYSTEM)}"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._raylets):
            self.kill(name)
        for process in self._started:
            if process.is_running():
                process.kill()
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, name: str, on: str) -> None:
        """A node for one actor, with the label `place` of that name."""
        self._start(name, on, 1, [f"--address={self.address}"])

    def cut(self) -> None:
        """No packet passes any more."""
        _ip("-n", self._space("second"), "link", "set", "wire", "down")

    def mend(self) -> None:
        """Packets pass again."""
        _ip("-n", self._space("second"), "link", "set", "wire", "up")

    def kill(self, name: str) -> None:
        """Every process of a node, at once."""
        raylet = self._raylets.pop(name)
        for process in [raylet, *_children(raylet)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def has_ended(self, name: str) -> bool:
        """Whether a node's raylet is gone, e.g. because the others hold it to be dead."""
        return not self._raylets[name].is_running() or self._raylets[name].status() == psutil.STATUS_ZOMBIE

    def forget(self, name: str) -> None:
        """A node has ended by itself."""
        del self._raylets[name]

    def raylets(self) -> list[psutil.Process]:
        """The parents of all actors."""
        return [process for process in self._raylets.values() if process.is_running()]

    def _start(self, name: str, machine: str, cpus: int, arguments: list[str]) -> None:
        before = {process.pid for process in self._in_space(machine)}
        command = ["ip", "netns", "exec", self._space(machine), sys.executable, "-m", "ray.scripts.scripts", "start"]
        settings = {
            "node-ip-address": ADDRESSES[machine],
            "labels": f"place={name}",
            "num-cpus": cpus,
            "num-gpus": 0,
            "object-store-memory": STORE_BYTES,
        }
        done = subprocess.run(
            [*command, *(f"--{key}={value}" for key, value in settings.items()), "--disable-usage-stats", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        new = [process for process in self._in_space(machine) if process.pid not in before]
        self._started += new
        self._raylets[name] = next(process for process in new if process.name() == "raylet")

    def _in_space(self, name: str) -> list[psutil.Process]:
        found = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True, check=True)
        processes = []
        for pid in found.stdout.split():
            try:
                processes.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return processes

    def _space(self, name: str) -> str:
        return f"{self._mark}{name}"


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
