"""Groups of 8, 64 and 256 completions, through the whole GRPO stage."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import SMALL, medtvt_rl

pytestmark = [pytest.mark.long, pytest.mark.cluster]
MOST_MEMORY = 1.1
ROLE = re.compile(r"ray::(RolloutGenerator|LearnerWorker|ReferencePolicy|RewardScorer)\b")


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


@contextmanager
def peaks_of_roles() -> Iterator[dict[str, int]]:
    """The most memory of a process of each role meanwhile, in KiB: the kernel's own mark (VmHWM), which no short
    peak between two looks escapes."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    role = ROLE.match(" ".join(process.cmdline()))
                    mark = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                except (psutil.Error, OSError):
                    continue
                if role and mark:
                    peaks[role[1]] = max(peaks.get(role[1], 0), int(mark[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def test_a_group_of_64_takes_the_memory_of_one_of_8(root: Path) -> None:
    found = []
    for size in (8, 64):
        with peaks_of_roles() as peaks:
            # A budget that the smaller groups fill as well: it, not the size of a group, is what memory follows.
            grpo(root, size, "grpo.groups_per_step=2", "learner.token_budget=512")
        found.append(peaks)
    small, large = found
    assert set(small) == set(large) == {"RolloutGenerator", "LearnerWorker", "ReferencePolicy", "RewardScorer"}
    assert all(large[role] <= MOST_MEMORY * small[role] for role in large), found


def test_a_group_of_256_is_made_by_two_engines(root: Path) -> None:
    two = ("rollout.num_generators=2", "rollout.max_completions_per_engine=128")
    summary = grpo(root, 256, "grpo.groups_per_step=1", "grpo.max_staleness=0", *two)
    assert summary["grpo"]["completions"] == 256 and summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    (group,) = (root / "groups_of_256" / "journal" / "groups.jsonl").read_text().splitlines()
    assert len(json.loads(group)["lengths"]) == 256
    shares = [generator["share"] for generator in summary["grpo"]["generators"]]
    assert len(shares) == 2 and min(shares) > 0.3, shares
