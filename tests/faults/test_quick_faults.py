"""Every role of one run is killed, one after the other: it ends in the weights of a run that nothing befell."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
from harness import FaultyRun, audit
from small_run import SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS, GROUPS_PER_STEP = 8, 4


def settings(root: Path, *more: str) -> list[str]:
    """GRPO alone, on-policy, from the model of the small run."""
    return [
        *(*SMALL, "run.stages=[grpo]", f"data.root={root / 'cohort'}"),
        f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}",
        *("grpo.max_staleness=0", f"grpo.steps={STEPS}", "grpo.checkpoint_every=3", "grpo.held_out.every_steps=0"),
        *("supervision.silence_s=20", "supervision.max_restarts=10", *more),
    ]


def checksums(run: FaultyRun) -> list[int]:
    return [line["checksum"] for line in run.rows("steps")]


def test_learner_scorer_and_reference_are_killed_and_the_weights_are_those_of_an_undisturbed_run(
    root: Path, tmp_path: Path
) -> None:
    with FaultyRun(tmp_path / "plain", settings(root)) as plain:
        plain.finish()
    audit(plain, STEPS, GROUPS_PER_STEP, 0)
    with FaultyRun(tmp_path / "killed", settings(root, "learner.spares=1"), timeout_s=600) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 1)
        run.signal("learner", signal.SIGKILL, during="train_step")
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        run.signal("reference", signal.SIGKILL)
        run.signal("reward", signal.SIGKILL)
        run.wait_for(lambda: len(run.rows("steps")) >= 5)
        run.signal("learner", signal.SIGSTOP, during="train_step")
        said = run.finish()
    audit(run, STEPS, GROUPS_PER_STEP, 0)
    assert checksums(run) == checksums(plain) and len(set(checksums(run))) == STEPS
    events = Counter(event["role"] for event in run.rows("events"))
    assert events == {"learner": 2, "reward": 1, "reference": 1}
    assert all(event["outcome"] == "replaced" and event["node"] for event in run.rows("events"))
    assert run.metrics()[-1]["restarts/learner"] == 2
    assert said.count("to the same weights") == 2
    assert not (run.folder / "failure.json").exists()


def test_a_generator_is_killed_and_stopped_and_no_group_is_lost(root: Path, tmp_path: Path) -> None:
    steps = 24  # the second fault comes while the generators still have much to do
    arguments = settings(root, "grpo.max_staleness=2", "rollout.num_generators=2", f"grpo.steps={steps}")
    with FaultyRun(tmp_path / "generators", arguments, timeout_s=600) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 1)
        run.signal("rollout", signal.SIGKILL, during="generate")
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        run.signal("rollout", signal.SIGSTOP, during="generate")
        run.finish()
    audit(run, steps, GROUPS_PER_STEP, 2)
    assert {event["role"] for event in run.rows("events")} <= {"rollout"}


def test_a_role_that_keeps_dying_ends_the_run_with_a_checkpoint_and_a_report(root: Path, tmp_path: Path) -> None:
    arguments = settings(root, "supervision.max_restarts=0")
    with FaultyRun(tmp_path / "ended", arguments, timeout_s=600) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 1)
        run.signal("reward", signal.SIGKILL)
        report = run.finish_badly()
    assert (report["incidents"][-1]["role"], report["incidents"][-1]["outcome"]) == ("reward", "given up")
    assert Path(report["checkpoint"]).name == f"step_{len(run.rows('steps')):06d}"
    assert run.leftovers() == []
