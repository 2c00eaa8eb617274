"""Every role is killed and stopped at every phase of a step and while checkpoints are written, one after the other in
one run: each time it is replaced, and no group is lost or repeated."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from statistics import median

import pytest
from fault_table import FaultTable
from harness import CLASSES, FaultyRun
from long_run import conclude, settings
from strikes import PHASES, Strikes, being_written

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(7200)]
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
NUM_MOMENTS, SEED = 10, 20


def test_every_role_at_every_phase(root: Path, tmp_path: Path, table: FaultTable) -> None:
    arguments = settings(root)
    with FaultyRun(tmp_path / "phases", arguments, timeout_s=7000) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes = Strikes(run, table)
        for phase in PHASES:
            for role in CLASSES:
                for sent in SIGNALS:
                    strikes.at_phase(role, sent, phase)
        conclude(run, arguments)
    assert all(row.is_fine for row in strikes.rows), table.text()


def test_checkpoints_that_are_being_written(root: Path, tmp_path: Path, table: FaultTable) -> None:
    """The learner at ten random moments, the others at one of them."""
    arguments, chance = settings(root, "grpo.checkpoint_every=2"), random.Random(SEED)
    with FaultyRun(tmp_path / "checkpoints", arguments, timeout_s=7000) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        usual_s, strikes = how_long_writing_takes(run), Strikes(run, table)
        for moment in range(NUM_MOMENTS):
            share = chance.random()
            for role in CLASSES if moment == NUM_MOMENTS // 2 else ("learner",):
                for sent in SIGNALS:
                    strikes.in_checkpoint(role, sent, share, usual_s)
        conclude(run, arguments)
    assert all(row.is_fine for row in strikes.rows), table.text()


def how_long_writing_takes(run: FaultyRun) -> float:
    """The median of three checkpoints, seconds."""
    found = []
    for _ in range(3):
        run.wait_for(lambda: being_written(run.folder), pause_s=0.001)
        began = time.monotonic()
        run.wait_for(lambda: not being_written(run.folder), pause_s=0.001)
        found.append(time.monotonic() - began)
    return median(found)
