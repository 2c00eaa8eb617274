"""The run that many faults befall one after the other, and its end: stopped when there are no more, and gone on from.

Owns: its settings, the resume with which it ends, the audit. Does not own: the faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import FaultyRun, audit
from small_run import SMALL

GROUPS_PER_STEP, MAX_STALENESS = 4, 2
NO_END = 1_000_000
LAST_STEPS = 3


def settings(root: Path, *more: str) -> list[str]:
    """GRPO alone, asynchronous, from the model of the small run; actors may be lost any number of times."""
    return [
        *(*SMALL, "run.stages=[grpo]", f"data.root={root / 'cohort'}"),
        f"model.init={root / 'small' / 'stages' / 'sft' / 'model'}",
        *(f"grpo.max_staleness={MAX_STALENESS}", "grpo.checkpoint_every=5", "grpo.held_out.every_steps=0"),
        *("supervision.silence_s=12", "supervision.max_restarts=100000", "supervision.max_attempts=10"),
        *("learner.start_timeout_s=900", "rollout.start_timeout_s=900", "rollout.update_timeout_s=120"),
        *("learner.spares=1", "rollout.spares=1", f"grpo.steps={NO_END}", *more),
    ]


def conclude(run: FaultyRun, arguments: Sequence[str], **how: Any) -> None:
    """Stops a run without end, goes on from its checkpoint for some steps, and looks at all it has left."""
    assert run.stop() == 143, run.said[-3000:]
    assert run.leftovers() == []
    go_on(run.folder, arguments, **how)


def go_on(
    folder: Path,
    arguments: Sequence[str],
    timeout_s: float = 900,
    max_staleness: int = MAX_STALENESS,
    **how: Any,
) -> FaultyRun:
    """Some more steps of a run that was stopped or killed, then the audit of all; `how` as FaultyRun takes it."""
    journal = (folder / "journal" / "steps.jsonl").read_text()
    steps = journal.count("\n") + LAST_STEPS
    with FaultyRun(folder, [*arguments, f"grpo.steps={steps}"], timeout_s, **how) as last:
        last.finish()
    audit(last, steps, GROUPS_PER_STEP, max_staleness)
    return last
