"""Bit for bit: on-policy runs of one seed, whatever befell one of them, and steps that are repeated from their records.

The run that others are compared with is made by the first test: they are run in this order.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import FaultyRun
from safetensors import safe_open
from small_run import PROJECT, SMALL, medtvt_rl

STEPS = 7


def on_policy_settings(root: Path, name: str) -> list[str]:
    """GRPO alone, from the model that SFT left in the small run.

    Version 2, from which one of them goes on, has a checkpoint, and held-out answers only in the run that goes on.
    """
    return [
        *(f"run.name={name}", "run.stages=[grpo]", f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}"),
        *("grpo.max_staleness=0", f"grpo.steps={STEPS}", "grpo.checkpoint_every=2", "rollout.num_generators=2"),
        *("grpo.held_out.every_steps=4", "grpo.held_out.max_prompts=4", "grpo.dynamic_sampling.max_replaced=1"),
    ]


def on_policy_run(root: Path, name: str) -> list[dict[str, Any]]:
    """The journal's lines of its steps."""
    done = medtvt_rl(root, "grpo", *SMALL, *on_policy_settings(root, name))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (root / name / "journal" / "steps.jsonl").read_text().splitlines()]


def replay(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "replay", str(run), *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.cluster
def test_two_on_policy_runs_of_one_seed_end_in_equal_weights_whatever_befalls_one_of_them(root: Path) -> None:
    """Its actors are killed and stopped, the run itself is killed and goes on from a checkpoint."""
    first = on_policy_run(root, "exact")
    assert len({step["checksum"] for step in first}) == STEPS, "every step changed the weights"
    settings = [*SMALL, *on_policy_settings(root, "struck"), "learner.spares=1", "supervision.silence_s=20"]
    with FaultyRun(root / "struck", settings, timeout_s=600) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 1)
        run.signal("learner", signal.SIGKILL, during="train_step")
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        run.kill()
        assert run.leftovers(120) == [] and run.said.count("to the same weights") == 1
    damaged = root / "struck" / "checkpoints" / "step_000009"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{}")
    with FaultyRun(root / "struck", settings, timeout_s=600) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 4)
        run.signal("reference", signal.SIGKILL)
        run.signal("reward", signal.SIGKILL)
        run.wait_for(lambda: len(run.rows("steps")) >= 5)
        run.signal("learner", signal.SIGSTOP, during="train_step")
        said = run.finish()
    assert "step_000009 is damaged and passed over" in said and "grpo: goes on from step 2" in said
    assert run.leftovers() == [] and said.count("to the same weights") == 1
    ends = [[(step["step"], step["checksum"]) for step in steps] for steps in (first, run.rows("steps"))]
    assert ends[0] == ends[1], "each step once, and to the same weights"
    for name in ("journal/groups.jsonl", "journal/samples.jsonl", "stages/grpo/model/model.safetensors"):
        assert (root / "exact" / name).read_bytes() == (root / "struck" / name).read_bytes(), name
    events = run.rows("events")
    assert Counter(event["role"] for event in events) == {"learner": 2, "reward": 1, "reference": 1}
    assert all(event["outcome"] == "replaced" and event["node"] for event in events)
    assert not (run.folder / "failure.json").exists()
    assert (root / "struck" / "checkpoints" / "finished.json").is_file()
    done = replay(root / "exact", "--from-step", "4", "--to-step", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "versions 5 to 6 equal the run's weights bit for bit" in done.stdout
    other = medtvt_rl(root, "grpo", *settings, f"grpo.steps={STEPS + 1}", "grpo.group_size=2")
    assert other.returncode == 1 and "grpo.group_size: 4 then, 2 now" in other.stderr


@pytest.mark.cluster
def test_the_steps_of_an_asynchronous_run_are_repeated_bit_for_bit(root: Path) -> None:
    run = Path(shutil.copytree(root / "small", root / "replayed"))
    done = replay(run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "versions 1 to 3 equal the run's weights bit for bit" in done.stdout
    later = replay(run, "--from-step", "2", "--to-step", "3")
    assert later.returncode == 0 and "versions 3 to 3 equal" in later.stdout, later.stdout + later.stderr
    late = replay(run, "--from-step", "1")
    assert late.returncode == 2 and "there are checkpoints of [0, 2]" in late.stderr
    steps = run / "journal" / "steps.jsonl"
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    lines[1]["checksum"] ^= 1
    steps.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = replay(run)
    assert wrong.returncode == 1 and "step 1: weights of version 2 have checksum" in wrong.stderr


def start(root: Path, *settings: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A GRPO stage as a process of its own, and its output."""
    name = settings[0].removeprefix("run.name=")
    log = root / f"{name}.log"
    command = [sys.executable, "-m", "pipelines.grpo", "-c", "configs/quickstart.yaml", f"run.root={root}", *SMALL]
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, *settings], cwd=PROJECT, env=environment, stdout=file, stderr=file), log


def wait_for_steps(root: Path, name: str, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when so many steps are told."""
    metrics, deadline = root / name / "metrics.jsonl", time.monotonic() + 300
    while not metrics.is_file() or metrics.read_text().count('"grpo"') < count:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.cluster
def test_an_asynchronous_run_that_is_told_to_stop_goes_on_with_more_ranks_and_loses_nothing(root: Path) -> None:
    settings = [
        *("run.name=stopped", "run.stages=[grpo]", f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}"),
        *("grpo.max_staleness=2", "grpo.steps=8", "grpo.checkpoint_every=100", "grpo.held_out.every_steps=0"),
        # The learner is the slower one, so that groups wait for it.
        *("grpo.updates_per_batch=8", "rollout.num_generators=2"),
    ]
    process, log = start(root, *settings)
    wait_for_steps(root, "stopped", 2, process, log)
    process.terminate()
    assert process.wait(timeout=60) == 143, log.read_text()[-3000:]
    run = root / "stopped"
    done_before = rows(run / "journal" / "steps.jsonl")
    at = len(done_before)
    assert f"SIGTERM: the newest checkpoint is that of step {at}. " in log.read_text()
    folder = run / "checkpoints" / f"step_{at:06d}"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [folder.name]
    with safe_open(folder / "groups.safetensors", framework="np") as file:
        kept = [group["group_id"] for group in json.loads(file.metadata()["groups"])]
    assert kept, "groups waited for the learner"
    resumed = medtvt_rl(root, "grpo", *SMALL, *settings, "learner.num_workers=2", "learner.zero_stage=1")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert f"grpo: goes on from step {at} " in resumed.stdout
    assert "learner.num_workers: 1 then, 2 now; learner.zero_stage: 2 then, 1 now" in resumed.stdout
    assert rows(run / "journal" / "steps.jsonl")[:at] == done_before
    both = replay(run)
    assert both.returncode == 2 and f"the steps from {at} on were learnt with other settings" in both.stderr
    assert "learner.num_workers: 1 then, 2 now" in both.stderr
    before = replay(run, "--to-step", str(at))
    assert before.returncode == 0, before.stdout + before.stderr
    groups = rows(run / "journal" / "groups.jsonl")
    ids = [group["group_id"] for group in groups]
    assert len(ids) == len(set(ids)) == 32 and set(kept) <= {*ids}
    assert {group["step"] for group in groups} == set(range(8))
    assert all(0 <= group["step"] - group["oldest_version"] <= 2 for group in groups)
    assert all(group["newest_version"] <= at for group in groups if group["group_id"] in kept)
