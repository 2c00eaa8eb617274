"""A real run whose reasoning rots while its answers stay as good: the alarm sounds.

The quickstart's supervised stages at their full length, since only a model that reasons can unlearn it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import PROJECT, run_stage_as_a_user

pytestmark = [pytest.mark.long, pytest.mark.cluster]
STEPS = 30


def test_the_alarm_sounds(tmp_path: Path) -> None:
    stages = "run.stages=[cohort,pretrain,sft]"
    done = run_stage_as_a_user("configs/quickstart.yaml", tmp_path, "run", stages, timeout_s=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    command = ["tests/benchmarks/bench_reward_hacking.py", "--run", str(tmp_path / "quickstart"), "--steps", str(STEPS)]
    hacked = subprocess.run(
        [sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False
    )
    assert hacked.returncode == 0, hacked.stdout[-3000:] + hacked.stderr[-3000:]
    alarms = [line for line in hacked.stdout.splitlines() if "grpo: ALARM: " in line]
    rots = [line for line in alarms if "the reasoning rots: held_out/findings_f1" in line]
    assert rots, hacked.stdout[-5000:]
