"""Repeats learner steps of a finished or interrupted run, and says whether the weights are the same bit for bit.

    medtvt-rl replay runs/NAME --from-step A --to-step B

The learners start from the checkpoint at A (0: the model that GRPO started from), are fed the recorded inputs of the
steps A to B - 1, and after each step export their weights: their checksum must be the journal's. Where it is not, the
first step that differs is named; then code, packages, machine or number of threads are others than in the run.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from actors.learner_gang import LearnerGang
from actors.placement import place, plan
from medtvt_rl.config import Config, load_config
from medtvt_rl.learner.step_record import STEPS_FOLDER, step_file
from pipelines.checkpoints import LEARNER, CheckpointStore
from pipelines.command import EXIT_USAGE, check_named, fail, in_session
from pipelines.journal import read_steps
from pipelines.reporter import Reporter
from pipelines.stages import start_model


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
        config = load_run(args.run)
        check_named(config)
        lines, ranks = check(config, args.from_step, args.to_step)
    except (ValueError, ReplayError) as error:
        return fail(str(error), EXIT_USAGE)
    config = replace(config, learner=replace(config.learner, num_workers=ranks))
    return in_session(config, lambda reporter: run(config, lines, reporter), with_ray=True)


def load_run(folder: Path) -> Config:
    """The configuration of a run in its present place. Raises ReplayError if the folder holds none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ReplayError(f"{folder}: there is no config.yaml; name the folder of a run, e.g. runs/quickstart")
    place = folder.resolve()
    return load_config(str(path), [f"run.root={place.parent}", f"run.name={place.name}"])


def check(config: Config, first: int, last: int | None) -> tuple[list[dict[str, Any]], int]:
    """The journal's lines of the steps first to last - 1, and the ranks that learnt them, which a resume may have
    changed. Raises ReplayError for what is missing, before any start."""
    lines = read_steps(config.folder / "journal")
    last = len(lines) if last is None else last
    if not 0 <= first < last <= len(lines):
        raise ReplayError(f"steps {first} to {last}: the journal has steps 0 to {len(lines)}; choose A < B among them")
    if first > 0:
        store = CheckpointStore.of(config)
        there = [0, *sorted(store.versions())]
        if first not in there:
            raise ReplayError(
                f"--from-step {first}: there is no {store.place(first)}; there are checkpoints of {there}"
            )
        try:
            store.read(first)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReplayError(f"--from-step {first}: {store.place(first)} is damaged: {error}") from error
    folder, ranks = config.folder / "journal" / STEPS_FOLDER, 0
    for step in (line["step"] for line in lines[first:last] if not line["skipped"]):
        found = next(rank for rank in count() if not step_file(folder, step, rank).is_file())
        if found == 0:
            path = step_file(folder, step, 0)
            raise ReplayError(f"there is no {path}; runs with grpo.record_steps=true keep the learners' inputs")
        if ranks not in (0, found):
            raise ReplayError(
                f"step {step} was learnt by {found} ranks, those before it by {ranks}; end with step {step}"
            )
        ranks = found
    return lines[first:last], ranks or config.learner.num_workers


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
