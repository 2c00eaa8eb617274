"""The first stage: studies in the published formats, validated once into the study store.

Where the configuration has a `cohort` section, a simulated cohort is written first; scores on it mean nothing
clinically.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from medtvt_rl.config import Config
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.study_store import StudyStore
from pipelines.reporter import Reporter


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Writes the cohort if there is none yet, builds or reuses the store; returns its counts and whether it built."""
    rendered = 0

    def on_study(done: int, total: int) -> None:
        nonlocal rendered
        rendered = done
        reporter.update(done)

    if config.cohort is not None:
        total = config.cohort.num_train + config.cohort.num_validation + config.cohort.num_test
        reporter.start("cohort", total, "study")
        write_cohort(config.cohort, Path(config.data.root), on_study)
        reporter.update(total)
    store, built = _build(config, reporter)
    counts = {split: len(store.study_ids(split)) for split in config.data.splits}
    reporter.line("studies: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    if store.problems:
        reporter.line(f"unusable: {len(store.problems)}, listed in {Path(config.data.store) / 'problems.csv'}")
    found = {"studies": counts, "problems": len(store.problems)}
    return {"summary": {"cohort": found}, "built": built or rendered > 0}


def build_store(config: Config, reporter: Reporter) -> StudyStore:
    """Validates the studies into the store; an up-to-date store is opened at once, and nothing is said of it."""
    return _build(config, reporter)[0]


def _build(config: Config, reporter: Reporter) -> tuple[StudyStore, bool]:
    """The store, and whether it had to be built."""
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            reporter.start("store", total, "study")
            started = True
        reporter.update(done)

    store = StudyStore.build(config.data, progress)
    return store, started


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["cohort", *sys.argv[1:]]))
