"""Where the tests of this folder find the small run of tests/integration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from small_run import SMALL, medtvt_rl


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model that GRPO starts from, and the cohort beside it."""
    root = tmp_path_factory.mktemp("faults")
    done = medtvt_rl(root, "run", *SMALL, "run.stages=[cohort,pretrain,sft]")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return root / "small" / "stages" / "sft" / "model"
