"""Repeats learner steps of a finished or interrupted run, and says whether the weights are the same bit for bit.

    medtvt-rl replay runs/NAME --from-step A --to-step B

The learners start from the checkpoint at A (0: the model that GRPO started from), are fed the recorded inputs of the
steps A to B - 1, and after each step export their weights: their checksum must be the journal's. Where it is not, the
first step that differs is named; then code, packages or machine are others than in the run. The settings are those that
the steps were learnt with (step_settings.py), whatever config.yaml says by now.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from actors.learner_gang import LearnerGang
from actors.placement import place, plan
from medtvt_rl.config import Config
from medtvt_rl.learner.step_record import STEPS_FOLDER, step_file
from pipelines.checkpoints import LEARNER, CheckpointStore
from pipelines.command import EXIT_USAGE, alone_in, check_named, fail, in_session
from pipelines.journal import read_steps
from pipelines.reporter import Reporter
from pipelines.stages import start_model
from pipelines.step_settings import learnt_with, load_kept


class ReplayError(RuntimeError):
    """The steps cannot be repeated, or came out otherwise; the message says which and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `replay`."""
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/quickstart")
    parser.add_argument("--from-step", type=int, default=0, metavar="A", help="0, or a step with a checkpoint")
    parser.add_argument("--to-step", type=int, metavar="B", help="default: the last step of the journal")


def command(args: argparse.Namespace) -> int:
    """`medtvt-rl replay`; returns the exit code."""
    try:
        config, lines = check(args.run, args.from_step, args.to_step)
        check_named(config)
        # Its learners write logs there, and a run's own actors look for their driver's mark.
        return alone_in(
            config, lambda: in_session(config, lambda reporter: run(config, lines, reporter), with_ray=True)
        )
    except (ValueError, ReplayError) as error:
        return fail(str(error), EXIT_USAGE)


def load_run(folder: Path) -> Config:
    """The configuration of a run in its present place. Raises ReplayError if the folder holds none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ReplayError(f"{folder}: there is no config.yaml; name the folder of a run, e.g. runs/quickstart")
    return load_kept(folder, path)


def check(run: Path, first: int, last: int | None) -> tuple[Config, list[dict[str, Any]]]:
    """The settings that the steps first to last - 1 were learnt with, and their lines of the journal.

    Raises:
        ReplayError, ValueError: what is missing, before any start.
    """
    lines = {line["step"]: line for line in read_steps(run / "journal")}
    begin, end = min(lines, default=0), max(lines, default=-1) + 1
    last = end if last is None else last
    if not begin <= first < last <= end:
        raise ReplayError(f"steps {first} to {last}: the journal has steps {begin} to {end}; choose A < B among them")
    if lost := [step for step in range(first, last) if step not in lines]:
        raise ReplayError(f"the journal has no line of step {lost[0]}; end with --to-step {lost[0]}, or begin after it")
    config = learnt_with(run, first, last)
    if first > 0:
        _check_checkpoint(CheckpointStore.of(config), first)
    folder = config.folder / "journal" / STEPS_FOLDER
    for step in (step for step in range(first, last) if not lines[step]["skipped"]):
        files = [step_file(folder, step, rank) for rank in range(config.learner.num_workers)]
        if missing := [path for path in files if not path.is_file()]:
            raise ReplayError(f"there is no {missing[0]}; runs with grpo.record_steps=true keep the learners' inputs")
    return config, [lines[step] for step in range(first, last)]


def _check_checkpoint(store: CheckpointStore, version: int) -> None:
    """Raises ReplayError where there is no whole one of this version."""
    there = [0, *sorted(store.versions())]
    if version not in there:
        raise ReplayError(
            f"--from-step {version}: there is no {store.place(version)}; there are checkpoints of {there}"
        )
    try:
        store.read(version)
    except Exception as error:
        if not store.is_damage(error):
            raise
        raise ReplayError(f"--from-step {version}: {store.place(version)} is damaged: {error}") from error


def run(config: Config, lines: list[dict[str, Any]], reporter: Reporter) -> None:
    """Repeats the steps of `lines`. Raises ReplayError at the first step whose weights differ."""
    asyncio.run(_replay(config, lines, reporter))


async def _replay(config: Config, lines: list[dict[str, Any]], reporter: Reporter) -> None:
    first = lines[0]["step"]
    placement = place(plan(config, {"learner": config.learner.num_workers}), config.placement, reporter.line)
    try:
        gang = await LearnerGang.start(config, placement, start_model(config))
        if first > 0:
            await gang.load_checkpoint(f"{CheckpointStore.of(config).place(first)}/{LEARNER}")
        reporter.start("replay", len(lines), "step")
        for done, line in enumerate(lines, start=1):
            if not line["skipped"]:
                await gang.replay_step(line["step"])
            _, checksum = await gang.export(line["step"] + 1)
            if checksum != line["checksum"]:
                raise ReplayError(
                    f"step {line['step']}: weights of version {line['step'] + 1} have checksum {checksum:#010x}, the "
                    f"journal says {line['checksum']:#010x}; the steps before it were equal"
                )
            reporter.update(done)
        gang.stop()
    finally:
        placement.release()
    reporter.finish("replay")
    version = lines[-1]["step"] + 1
    reporter.line(f"replay: versions {first + 1} to {version} equal the run's weights bit for bit")


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["replay", *sys.argv[1:]]))
