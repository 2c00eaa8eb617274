"""Walks the data of a configuration before a GPU is rented.

    medtvt-rl check-data -c configs/X.yaml [--quick] [--out FILE.csv] [key=value ...]

Owns: what a person sees of the walk, where the list of problems goes, the exit code. Does not own: the checks
(medtvt_rl/data/check). The terminal shows counts and names of files of the configuration; ids, values and texts of
patients stand in the list alone, which lies beside the study store.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from medtvt_rl.config_checks import ConfigError
from pipelines.command import EXIT_FAILED, EXIT_USAGE, fail, load, written_init

if TYPE_CHECKING:
    from medtvt_rl.config import Config
    from medtvt_rl.data.check.report import Report

INTERVAL_S = 5.0
COUNTS = (
    "studies",
    "patients",
    "ECGs",
    "films",
    "with laboratory values",
    "laboratory values",
    "rows without an ECG",
    "rows without a film",
    "rows without laboratory values",
    "questions: ecg",
    "questions: cxr",
    "questions: lab",
    "questions: diagnosis",
    "without a diagnosis question",
    "studies with unusable files",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `check-data`."""
    parser.add_argument("-c", "--config", required=True, help="YAML file with deviations from the defaults")
    parser.add_argument("--quick", action="store_true", help="open films without decoding them")
    parser.add_argument("--out", type=Path, help="CSV file of problems (default: beside data.store)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def command(args: argparse.Namespace) -> int:
    """`medtvt-rl check-data`; returns 0, 1 where something would stop training, 2 for a mistake in the arguments."""
    from medtvt_rl.logs import quiet_environment

    quiet_environment()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        config = load(args.config, args.overrides)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    from medtvt_rl.data.check.walk import check_data

    out: Path = args.out or default_list(config)
    if out.suffix != ".csv":
        return fail(
            f"--out {out}: expected a file named *.csv; a json of the same name is written beside it", EXIT_USAGE
        )
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    try:
        with Phases(console) as phases:
            # A source that cannot be written is one of the problems that are told below.
            with suppress(ValueError):
                written_init(config, console.print, lambda done, total: phases.update("model", done, total))
            report = check_data(config, quick=args.quick, progress=phases.update)
        report.write(out)
    except KeyboardInterrupt:
        return fail("check-data: interrupted before any study was read; nothing was written", EXIT_FAILED)
    except OSError as error:
        return fail(
            f"check-data: {error.strerror or error}: {error.filename or out}; choose --out FILE.csv", EXIT_FAILED
        )
    show(console, report, out)
    return EXIT_FAILED if report.stops or report.interrupted else 0


def default_list(config: Config) -> Path:
    """Beside the study store; in the current folder where there is no place for a store yet, and none is made."""
    from medtvt_rl.data.study_build import store_folder

    store = store_folder(config.data)
    listed = store.with_name(f"{store.name}.check.csv")
    return listed if listed.parent.is_dir() else Path(listed.name)


class Phases:
    """Progress of one phase after the other: bars on a terminal, else a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._said_s, self._phase = console, time.monotonic(), ""
        self._task: TaskID | None = None
        columns = (TextColumn("{task.description:<10}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def update(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` of this phase are finished."""
        if self._bars is not None:
            if phase != self._phase:
                self._phase, self._task = phase, self._bars.add_task(phase, total=total)
            if self._task is not None:
                self._bars.update(self._task, completed=done)
        elif time.monotonic() - self._said_s >= INTERVAL_S:
            self._said_s = time.monotonic()
            self._console.print(f"{phase}: {done} of {total}", markup=False)


def show(console: Console, report: Report, out: Path) -> None:
    """Counts, checks and the verdict."""
    if report.splits:
        console.print(_counts_table(report))
    console.print(_checks_table(report))
    for check in report.checks.values():
        if check.note:
            console.print(f"{check.name}: {check.note}", markup=False)
    number = sum(check.counts.total() for check in report.checks.values())
    console.print(f"{number} {'entry' if number == 1 else 'entries'} in {out}", markup=False)
    if report.interrupted:
        console.print(f"interrupted {report.interrupted}: the files of the rest were not looked at", markup=False)
    for sentence in report.stops:
        console.print(f"stops training: {sentence}", markup=False)
    if not report.stops and not report.interrupted:
        console.print("nothing here would stop training", markup=False)


def _counts_table(report: Report) -> Table:
    names = [*COUNTS, *sorted({name for counts in report.splits.values() for name in counts} - set(COUNTS))]
    table = Table(title="what is there", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for split in report.splits:
        table.add_column(split, justify="right")
    for name in names:
        if any(name in counts for counts in report.splits.values()):
            table.add_row(name, *(str(counts.get(name, 0)) for counts in report.splits.values()))
    return table


def _checks_table(report: Report) -> Table:
    from medtvt_rl.data.check.report import LEVELS

    table = Table(title="\nwhat was looked at", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("", "left"), ("number", "right"), ("of", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("stops", "left out", "to look at"):
        table.add_column(name, justify="right")
    for check in report.checks.values():
        counts = (check.counts[level] for level in LEVELS)
        table.add_row(check.name, str(check.looked_at), check.unit, *(str(n) if n else "-" for n in counts))
    return table


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["check-data", *sys.argv[1:]]))
