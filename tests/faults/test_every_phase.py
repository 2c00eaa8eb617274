"""Every role is killed and stopped at every phase of a step and while checkpoints are written: each time it is
replaced, and no group is lost or repeated. The learner alone, the others at once: their ways back overlap."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from fault_table import FaultTable
from harness import CLASSES, FaultyRun
from long_run import conclude, settings
from strikes import PHASES, Strikes, how_long_writing_takes

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(7200)]
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
TOGETHER = (("learner",), ("rollout", "reward", "reference"))
NUM_MOMENTS, SEED = 10, 20


def test_every_role_at_every_phase(root: Path, tmp_path: Path, table: FaultTable) -> None:
    arguments = settings(root)
    with FaultyRun(tmp_path / "phases", arguments, timeout_s=7000) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes = Strikes(run, table)
        for phase in PHASES:
            for roles in TOGETHER:
                for sent in SIGNALS:
                    strikes.at_phase(roles, sent, phase)
        conclude(run, arguments)
    assert len(strikes.rows) == len(PHASES) * len(CLASSES) * len(SIGNALS)
    assert all(row.is_fine for row in strikes.rows), table.text()


def test_one_of_two_ranks(root: Path, tmp_path: Path, table: FaultTable) -> None:
    """The gang is ended and started again as a whole."""
    arguments = settings(root, "learner.num_workers=2", "learner.spares=0")
    with FaultyRun(tmp_path / "gang", arguments, timeout_s=1800) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes = Strikes(run, table, ", one of two ranks")
        for phase in ("backward", "optimizer step", "before publishing"):
            for sent in SIGNALS:
                strikes.at_phase(["learner"], sent, phase)
        conclude(run, arguments)
    assert len(strikes.rows) == 3 * len(SIGNALS)
    assert all(row.is_fine for row in strikes.rows), table.text()


def test_checkpoints_that_are_being_written(root: Path, tmp_path: Path, table: FaultTable) -> None:
    """At ten random moments of their writing."""
    arguments, chance = settings(root, "grpo.checkpoint_every=2"), random.Random(SEED)
    with FaultyRun(tmp_path / "checkpoints", arguments, timeout_s=7000) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        usual_s, strikes = how_long_writing_takes(run), Strikes(run, table)
        for _ in range(NUM_MOMENTS):
            share = chance.random()
            for roles in TOGETHER:
                for sent in SIGNALS:
                    strikes.in_checkpoint(roles, sent, share, usual_s)
        conclude(run, arguments)
    assert len(strikes.rows) == NUM_MOMENTS * len(CLASSES) * len(SIGNALS)
    assert sum(row.phase.startswith("checkpoint") for row in strikes.rows) >= len(strikes.rows) // 2, table.text()
    assert all(row.is_fine for row in strikes.rows), table.text()
