"""Groups of 8, 64 and 256 completions, through the whole GRPO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import SMALL, medtvt_rl

pytestmark = [pytest.mark.long, pytest.mark.cluster]
MOST_MEMORY = 1.2


def grpo(root: Path, size: int, *settings: str) -> dict[str, Any]:
    """One step from the model of the small run; its summary."""
    done = medtvt_rl(
        *(root, "grpo", *SMALL, f"run.name=groups_of_{size}", "run.stages=[grpo]", f"grpo.group_size={size}"),
        *(f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}", "grpo.steps=1", "grpo.held_out.every_steps=0"),
        *settings,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary: dict[str, Any] = json.loads((root / f"groups_of_{size}" / "summary.json").read_text())
    return summary


def test_a_group_of_64_takes_the_memory_of_one_of_8(root: Path) -> None:
    peaks = {size: grpo(root, size, "grpo.groups_per_step=2")["peak_rss_bytes"] for size in (8, 64)}
    assert peaks[64] <= MOST_MEMORY * peaks[8], peaks


def test_a_group_of_256_is_made_by_two_engines(root: Path) -> None:
    two = ("rollout.num_generators=2", "rollout.max_completions_per_engine=128")
    summary = grpo(root, 256, "grpo.groups_per_step=1", "grpo.max_staleness=0", *two)
    assert summary["grpo"]["completions"] == 256 and summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    (group,) = (root / "groups_of_256" / "journal" / "groups.jsonl").read_text().splitlines()
    assert len(json.loads(group)["lengths"]) == 256
    shares = [generator["share"] for generator in summary["grpo"]["generators"]]
    assert len(shares) == 2 and min(shares) > 0.3, shares
