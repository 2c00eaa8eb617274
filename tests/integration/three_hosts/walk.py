"""docs/cluster.md walked through on hosts of one's own: up, submit, stop, submit again, who ran where, down.

Run as a script it walks with the configuration and the overrides given, and shows where each role ran:

    sudo .venv/bin/python tests/integration/three_hosts/walk.py -c configs/on_cluster.yaml run.name=first ...
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from hosts import PROJECT, World, missing
from local_cluster import PRIVATE_KEY, local_cluster, offers

CLUSTER_FILE = "/root/cluster.yaml"
JOB_SERVER = "http://localhost:8265"
# With a host that has no GPU the same labels say where a role lives.
WITHOUT_GPUS = [f"placement.{role}.gpus=0" for role in ("learner", "rollout", "reference")]
# Ray Train's workers are the learners of the supervised stages.
ROLES = {
    "RayTrainWorker": "supervised",
    "LearnerWorker": "learner",
    "RolloutGenerator": "rollout",
    "ReferencePolicy": "reference",
    "RewardScorer": "reward",
}
# Ray's launcher for nodes that are given, not rented, needs its first autoscaler.
CLIENT = {"RAY_AUTH_MODE": "token", "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class CommandError(RuntimeError):
    """A command of the walk failed; the message has its last words."""


class Walk:
    """The commands of docs/cluster.md, as typed on the laptop; what each printed lies in `folder`/logs."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self._cluster = yaml.safe_load((PROJECT / "cluster.yaml").read_text())
        self.world = World(folder, offers(self._cluster, cpus))
        self._logs = folder / "logs"
        self._forward: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """`ray up`, and the job server on the laptop's port 8265; the world must be there."""
        self._logs.mkdir()
        addresses = {name: address for name, address in self.world.addresses.items() if name != "laptop"}
        self.world.laptop_file(CLUSTER_FILE).write_text(yaml.safe_dump(local_cluster(self._cluster, addresses)))
        key = PRIVATE_KEY.replace("~", "/root")
        self.world.laptop_file(key).parent.mkdir(mode=0o700)
        shutil.copy(self.world.folder / "key", self.world.laptop_file(key))
        self.run("token", ["ray", "get-auth-token", "--generate"], 60)
        self.run("up", ["ray", "up", "--yes", CLUSTER_FILE], 400)
        with (self._logs / "dashboard").open("wb") as log:
            command = self.world.laptop(["ray", "dashboard", CLUSTER_FILE], CLIENT)
            self._forward = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait_for_nodes(len(addresses))

    def submit(self, name: str, arguments: Sequence[str], timeout_s: float, wait: bool = True) -> str:
        """`ray job submit` of `python -m pipelines.run` with these arguments; the output."""
        options = ["--address", JOB_SERVER, "--submission-id", name, "--working-dir", "."]
        entry = ["python", "-m", "pipelines.run", *arguments]
        return self.run(
            name, ["ray", "job", "submit", *options, *([] if wait else ["--no-wait"]), "--", *entry], timeout_s
        )

    def job(self, *arguments: str) -> str:
        """Output of another `ray job` command."""
        verb, *rest = arguments
        return self.run(f"job_{verb}", ["ray", "job", verb, "--address", JOB_SERVER, *rest], 360)

    def on_head(self, command: str) -> str:
        """Output of `ray exec`."""
        return self.run("exec", ["ray", "exec", CLUSTER_FILE, command], 120)

    def whereabouts(self) -> dict[str, set[str]]:
        """Role -> hosts on which Ray started actors of it, those that have ended included."""
        nodes = {node["node_id"]: node["node_name"] for node in self._listed("nodes")}
        names = {address: name for name, address in self.world.addresses.items()}
        found: dict[str, set[str]] = {}
        for actor in self._listed("actors"):
            kind = actor["class_name"].rpartition(".")[2]
            if actor["node_id"]:  # else it was asked for, and never started
                found.setdefault(ROLES.get(kind, kind), set()).add(names[nodes[actor["node_id"]]])
        return found

    def notice(self, host: str) -> None:
        """A host is told that it will be taken away; returns when Ray takes nothing more there."""
        reach = ["ssh", "-i", PRIVATE_KEY.replace("~", "/root"), "-o", "StrictHostKeyChecking=no"]
        told = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token; cd ~/medtvt-rl && "
        told += ".venv/bin/python tests/integration/three_hosts/notice.py"
        self.run("notice", [*reach, f"root@{self.world.addresses[host]}", told], 120)
        deadline = time.monotonic() + 150
        while any(node["node_name"] == self.world.addresses[host] for node in self._alive()):
            if time.monotonic() > deadline:
                raise CommandError(f"150 s after the notice {host} is still a node of the cluster")
            time.sleep(2)

    def down(self) -> None:
        """`ray down`; it returns 0 even when it fails, so the hosts are looked at afterwards."""
        self.run("down", ["ray", "down", "--yes", CLUSTER_FILE], 180)
        deadline = time.monotonic() + 120
        while left := self._ray_processes():
            if time.monotonic() > deadline:
                raise CommandError(f"120 s after `ray down` {', '.join(left)} still run")
            time.sleep(1)

    def run(self, name: str, command: Sequence[str], timeout_s: float) -> str:
        """Runs a command on the laptop.

        Raises:
            CommandError: it failed, or took longer.
        """
        print(f"$ {shlex.join(command)}", flush=True)
        began, log = time.monotonic(), self._logs / name
        # Not a pipe: processes that the command leaves behind would hold it open.
        with log.open("wb") as output:
            entered = self.world.laptop(command, CLIENT)
            try:
                done = subprocess.run(
                    entered, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=timeout_s, check=False
                )
            except subprocess.TimeoutExpired:
                raise CommandError(f"{name} took longer than {timeout_s:g} s: {_end(log)}") from None
        if done.returncode:
            raise CommandError(f"{name} ended with {done.returncode}: {_end(log)}")
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        return log.read_text(errors="replace")

    def _wait_for_nodes(self, count: int) -> None:
        deadline, told = time.monotonic() + 300, ""
        while time.monotonic() < deadline:
            try:
                alive = self._alive()
            except CommandError as error:  # the forwarded port is not open yet
                told = str(error)
            else:
                if len(alive) == count:
                    return
                told = f"{len(alive)} are"
            time.sleep(5)
        said = self.on_head("tail -n 40 /tmp/ray/session_latest/logs/monitor.{log,out,err}")
        raise CommandError(f"waited 300 s for {count} nodes to be alive: {told}; {said[-6000:]}")

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._listed("nodes") if node["state"] == "ALIVE"]

    def _ray_processes(self) -> list[str]:
        names = []
        for process in self.world.processes():
            with suppress(psutil.NoSuchProcess):
                names.append(process.name())
        return [name for name in names if name in ("raylet", "gcs_server")]

    def _listed(self, what: str) -> list[dict[str, Any]]:
        options = ["--address", JOB_SERVER, "--format", "json", "--limit", "1000"]
        text = self.run(f"list_{what}", ["ray", "list", what, "--detail", *options], 120)
        return list(json.loads(text[text.index("[") :]))


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="configs/on_cluster.yaml")
    parser.add_argument("--keep", type=Path, help="where the run folder is copied to")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"walk: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="hosts") as folder:
        walk = Walk(Path(folder))
        with walk.world:
            walk.up()
            print(walk.submit("first", ["-c", arguments.config, *WITHOUT_GPUS, *arguments.overrides], 3600))
            for role, names in sorted(walk.whereabouts().items()):
                print(f"{role:20} {', '.join(sorted(names))}")
            walk.down()
        if arguments.keep:
            shutil.copytree(Path(folder) / "shared", arguments.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
