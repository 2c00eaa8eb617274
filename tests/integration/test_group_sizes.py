"""Groups of 8, 64 and 256 completions, through the whole GRPO stage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness import CLASSES, FaultyRun
from small_run import SMALL, medtvt_rl

pytestmark = [pytest.mark.long, pytest.mark.cluster]
MOST_MEMORY = 1.1


def settings(root: Path, size: int) -> list[str]:
    """GRPO alone, from the model of the small run."""
    return [
        *(*SMALL, f"run.name=groups_of_{size}", "run.stages=[grpo]", f"grpo.group_size={size}"),
        *(f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}", "grpo.held_out.every_steps=0"),
    ]


def peaks(root: Path, size: int) -> dict[str, int]:
    """The most memory that the process of each role and the driver have had by the end of the first step, in KiB: the
    kernel's own mark, which a look at any later moment still finds."""
    # A budget that small groups fill as well: it, not the size of a group, is what memory follows.
    more = ("grpo.groups_per_step=2", "learner.token_budget=512", "grpo.steps=1000")
    with FaultyRun(root / f"groups_of_{size}", [*settings(root, size), *more]) as run:
        run.wait_for(lambda: run.rows("steps"))
        found = {role: high_water(run.wait_for(lambda role=role: run.actor(role)).pid) for role in CLASSES}
        found["driver"] = high_water(run.driver.pid)
        assert run.stop() == 143, run.said[-3000:]
    return found


def high_water(pid: int) -> int:
    """The peak resident set size of a process, in KiB."""
    mark = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert mark
    return int(mark[1])


def test_a_group_of_64_takes_the_memory_of_one_of_8(root: Path) -> None:
    small, large = peaks(root, 8), peaks(root, 64)
    assert all(large[role] <= MOST_MEMORY * small[role] for role in small), (small, large)


def test_a_group_of_256_is_made_by_two_engines(root: Path) -> None:
    two = ("rollout.num_generators=2", "rollout.max_completions_per_engine=128")
    done = medtvt_rl(
        *(root, "grpo", *settings(root, 256), *two, "grpo.groups_per_step=1", "grpo.max_staleness=0", "grpo.steps=1")
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((root / "groups_of_256" / "summary.json").read_text())
    assert summary["grpo"]["completions"] == 256 and summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    (group,) = (root / "groups_of_256" / "journal" / "groups.jsonl").read_text().splitlines()
    assert len(json.loads(group)["lengths"]) == 256
    shares = [generator["share"] for generator in summary["grpo"]["generators"]]
    assert len(shares) == 2 and min(shares) > 0.3, shares
