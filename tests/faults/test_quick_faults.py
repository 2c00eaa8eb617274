"""Generators of a run are killed and stopped, and a role is lost for good.

What becomes of a run whose other roles are killed: tests/integration/test_exactness.py.
"""

from __future__ import annotations

import signal
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
