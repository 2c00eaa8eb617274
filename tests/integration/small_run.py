"""The overrides of a run that is whole, and small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SMALL = [
    "run.name=small",
    "cohort.num_train=96",
    "cohort.num_validation=16",
    "cohort.num_test=16",
    "encoders.ecg_steps=20",
    "encoders.cxr_steps=20",
    "encoders.lab_steps=20",
    "pretrain.epochs=1",
    "sft.epochs=2",
    "sft.validation_studies=8",
    "sft.validation_samples=2",
    "grpo.steps=3",
    "grpo.groups_per_step=4",
    "grpo.group_size=4",
    "grpo.checkpoint_every=2",
    "rewards.flaky.function=tests.integration.flaky_reward:flaky_reward",
    "evaluation.num_samples=2",
    "evaluation.bootstrap_resamples=200",
    # Processes that only wait for a fault cost a small run a third of its time.
    "learner.spares=0",
    "rollout.spares=0",
]


def medtvt_rl(root: Path, *arguments: str, timeout_s: float = 420) -> subprocess.CompletedProcess[str]:
    """Runs a stage of the quickstart in a process of its own, as a user does."""
    return run_stage_as_a_user("configs/quickstart.yaml", root, *arguments, timeout_s=timeout_s)


def run_stage_as_a_user(
    config: str, root: Path, *arguments: str, timeout_s: float = 420
) -> subprocess.CompletedProcess[str]:
    """Runs a stage, the first of the arguments, in a process of its own."""
    command = [sys.executable, "-m", f"pipelines.{arguments[0]}", "-c", config, f"run.root={root}"]
    return subprocess.run(
        [*command, *arguments[1:]],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
