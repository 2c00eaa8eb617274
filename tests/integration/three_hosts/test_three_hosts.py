"""A head and four hosts in namespaces: `ray up`, a job that is stopped and goes on, who ran where, a spot notice,
`ray down`. SFT and the learners of GRPO span two of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hosts import World, missing
from small_run import SMALL
from walk import WITHOUT_GPUS, Walk

WHY_NOT = missing()
pytestmark = [pytest.mark.cluster, pytest.mark.hosts, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
CPUS = 4
LEARNERS = {"learner", "learner2"}
HOSTS_OF = {
    "supervised": LEARNERS,
    "learner": LEARNERS,
    "rollout": {"rollout"},
    "reference": {*LEARNERS, "rollout"},
    "reward": {"scoring"},
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since the sockets of Ray lie below such a path."""
    path = Path(tempfile.mkdtemp(prefix="hosts"))
    yield path
    shutil.rmtree(path)


def interfaces_and_mounts() -> tuple[str, str]:
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, timeout=30, check=True)
    return links.stdout, Path("/proc/self/mountinfo").read_text()


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.timeout(2400)
def test_a_job_runs_on_the_hosts_declared_for_its_roles(folder: Path) -> None:
    before, walk = interfaces_and_mounts(), Walk(folder, CPUS)
    with walk.world:
        walk.up()
        resolved = walk.on_head("cd ~/medtvt-rl && python -m pipelines.run -c configs/on_cluster.yaml --dry-run")
        assert "rollout 0: 1 CPU, 1 GPU on a node with role rollout" in resolved
        entry = ["-c", "configs/on_cluster.yaml", *WITHOUT_GPUS, *SMALL]
        entry += ["learner.num_workers=2", "pretrain.num_workers=1", "sft.num_workers=2", "rollout.num_generators=1"]
        entry += [f"placement.learner.cpus={CPUS - 1}"]  # so that no host has room for two ranks
        entry += ["evaluation.num_generators=1", "placement.timeout_s=60"]
        run = folder / "shared" / "runs" / "small"
        steps = _stop_in_the_middle(walk, run, entry)
        output = walk.submit("again", [*entry, f"grpo.steps={steps + 2}"], 900)
        assert "grpo: goes on from step" in output and "succeeded" in output
        summary = json.loads((run / "summary.json").read_text())
        assert summary["grpo"]["steps"] == steps + 2 and (run / "report.html").is_file()
        found = walk.whereabouts()
        for role, declared in HOSTS_OF.items():
            assert found[role] and found[role] <= declared, f"{role} ran on {found[role]}"
        assert found["supervised"] == found["learner"] == LEARNERS
        walk.notice("scoring")
        walk.down()
        processes = walk.world.processes()
    assert running(processes) == []
    assert interfaces_and_mounts() == before


def _stop_in_the_middle(walk: Walk, run: Path, entry: list[str]) -> int:
    """`ray job stop` during GRPO leaves the checkpoint of its last step, which is returned."""
    walk.submit("stopped", [*entry, "grpo.steps=1000"], 120, wait=False)  # more than pass until it is stopped
    deadline = time.monotonic() + 900
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count('"grpo"') < 2:
        assert time.monotonic() < deadline, walk.job("logs", "stopped")[-3000:]
        time.sleep(0.2)
    walk.job("stop", "stopped")
    steps = len((run / "journal" / "steps.jsonl").read_text().splitlines())
    assert f"SIGTERM: the newest checkpoint is that of step {steps}." in walk.job("logs", "stopped")
    return steps


def test_nothing_is_left_when_the_one_who_made_the_hosts_is_killed(folder: Path) -> None:
    before = interfaces_and_mounts()
    (folder / "made").mkdir()
    code = "import sys, pathlib, time; from hosts import World\n"
    code += "with World(pathlib.Path(sys.argv[1]), {'head': '', 'worker': ''}): print('up', flush=True); time.sleep(60)"
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "made")],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None and maker.stdout.readline() == "up\n"
    processes = psutil.Process(maker.pid).children(recursive=True)
    # Besides that of each host there may still be the one that answered whether it is up.
    assert sum(process.name() == "sshd" for process in processes) >= 2
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait(timeout=30)
    deadline = time.monotonic() + 30
    while running(processes):
        assert time.monotonic() < deadline, running(processes)
        time.sleep(0.1)
    assert interfaces_and_mounts() == before


def test_a_host_that_does_not_come_up_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosts.START_TIMEOUT_S", 5.0)
    world = World(folder, {"head": ""})
    monkeypatch.setattr(world, "_answers", lambda address: False)
    with pytest.raises(RuntimeError, match="waited 5 s for head's sshd"), world:
        pass
    assert world._outer is None
