"""`medtvt-rl simulate -c configs/X.yaml`: what more generators or learners would bring, before they are rented.

Owns: the command, its table, the files it leaves. Does not own: which runs are made (sweep.py), the page
(simulation_page.py), or a run itself (simulation.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.rollout.config import ROOM
from pipelines.command import EXIT_USAGE, check_named, fail, load

if TYPE_CHECKING:
    from actors.elastic import Policy
    from medtvt_rl.simulation.timings import Timings
    from pipelines.simulation import Outcome
    from pipelines.sweep import Findings

GENERATORS = "1,2,4,8,16,32,64,128,256,512,1000"
LEARNERS = "1,2,4,8"
HEAD = "generators  step s  groups/s  tokens/s  staleness    idle: generators  learner  reference  reward  driver"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `simulate`."""
    parser.add_argument("-c", "--config", required=True, help="YAML file with deviations from the defaults")
    parser.add_argument("--timings", type=Path, help="of `medtvt-rl bench` (default: in the run's folder)")
    parser.add_argument("--generators", default=GENERATORS, help=f"numbers to try (default {GENERATORS})")
    parser.add_argument("--learners", default=LEARNERS, help=f"ranks to find the best ratio for (default {LEARNERS})")
    parser.add_argument("--steps", type=int, default=24, help="of each simulated run, without warm-up (default 24)")
    parser.add_argument("--straggler", type=float, default=5.0, help="how much slower one generator is (default 5)")
    parser.add_argument("--loss-minutes", type=float, default=10.0, help="for which one generator is gone (default 10)")
    parser.add_argument("--out", type=Path, help="folder for the page and the JSON; by default that of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def command(args: argparse.Namespace) -> int:
    """`medtvt-rl simulate`; returns the exit code."""
    try:
        config = load(args.config, args.overrides)
        generators = numbers("--generators", args.generators)
        learners = numbers("--learners", args.learners)
        if args.steps < 2 or args.straggler < 1 or args.loss_minutes <= 0:
            raise ConfigError("simulate: expected --steps 2 or more, --straggler 1 or more, --loss-minutes above 0")
        from medtvt_rl.simulation.timings import Timings, TimingsError

        try:
            timings = Timings.read(args.timings or config.folder / "timings.json")
        except TimingsError as error:
            raise ConfigError(str(error)) from error
        policy = policy_of(config)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    from pipelines.simulation_page import simulation_page
    from pipelines.stages import write_json
    from pipelines.sweep import Sweep

    sweep = Sweep(config, timings, args.steps, lambda line: print(line, flush=True), policy)
    found = sweep.all(generators, learners, args.straggler, args.loss_minutes * 60)
    folder = args.out or config.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "simulation.json", _content(config, timings, found))
    (folder / "simulation.html").write_text(simulation_page(config, timings, found), encoding="utf-8")
    print(f"simulate: {folder / 'simulation.html'}, {folder / 'simulation.json'}")
    return 0


def policy_of(config: Config) -> Policy | None:
    """What decides how many generators serve, as in a run; None where the nodes do, or where none come and go. Raises
    ConfigError where `rollout.scaling` names no policy."""
    if config.rollout.least == config.rollout.most or config.rollout.scaling == ROOM:
        return None
    check_named(config, runs_here=False)
    from actors.elastic import make_policy

    try:
        return make_policy(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def numbers(option: str, text: str) -> list[int]:
    """Rising positive numbers. Raises ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} is {text!r}: expected positive numbers with commas between them, e.g. 1,2,4")
    return sorted({int(part) for part in parts})


def row(outcome: Outcome) -> str:
    """A line of the table."""
    idle = (outcome.generator_idle, outcome.learner_idle, outcome.reference_idle, outcome.scorer_idle)
    shares = [f"{max(0.0, share):.0%}" for share in (*idle, outcome.driver_idle)]
    if not outcome.setting.references:
        shares[2] = "-"
    stale = f"{outcome.staleness:.1f}, max {outcome.max_staleness}"
    return (
        f"{outcome.setting.generators:10d}  {outcome.step_s:6.2f}  {outcome.groups_per_s:8.2f}  "
        f"{outcome.tokens_per_s:8.0f}  {stale:>10}  {shares[0]:>16}  {shares[1]:>7}  {shares[2]:>9}  {shares[3]:>6}  "
        f"{shares[4]:>6}   limited by the {outcome.bottleneck}"
    )


def _content(config: Config, timings: Timings, found: Findings) -> dict[str, Any]:
    told = {**asdict(timings), "lengths": f"{len(timings.lengths)} groups"}
    return {"run": config.run.name, "timings": told, **_plain(asdict(found))}


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_plain(value) for value in content]
    return content


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["simulate", *sys.argv[1:]]))
