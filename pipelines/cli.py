"""The command line: `medtvt-rl STAGE -c configs/X.yaml key=value ...`, and the commands beside the stages.

Owns: arguments. Does not own: what a stage or a command does, or how it fails (command.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError
from pipelines.command import (
    EXIT_FAILED,
    EXIT_USAGE,
    alone_in,
    check_engine,
    check_named,
    fail,
    in_session,
    load,
)

if TYPE_CHECKING:
    from pipelines.reporter import Reporter

HELP = {
    "run": "all stages of run.stages, then the report; a finished stage is not run again",
    "cohort": "write the simulated cohort (if configured) and build the study store",
    "pretrain": "train the encoders' stand-in and explain each modality alone",
    "sft": "supervised fine-tuning on chains of evidence",
    "grpo": "reinforcement learning with the configured rewards",
    "evaluate": "held-out evaluation before and after GRPO, or of the one model that there is",
}
# Beside the stages. NAME lives in pipelines/NAME.py (with _ for -): add_arguments(parser), command(args) -> exit code.
COMMANDS = {
    "bench": "measure on this machine what `simulate` computes with",
    "build-qa": "make the instruction set from structured labels, by templates or by a language model",
    "check-cluster": "what is wrong in a cluster.yaml, which role would run where, and what it would cost",
    "check-data": "walk the data before a GPU is rented: counts, joins, units, labels, lengths, leakage",
    "diagnose": "read one patient's ECG, film and blood values, and name the diagnoses",
    "import-reference": "turn a published checkpoint into a model folder",
    "replay": "repeat recorded GRPO steps of a run and compare the weights bit for bit",
    "simulate": "what more generators or learners would bring: the real loop on a simulated clock",
    "study": "say which study a hashed id of a run's logs stands for",
    "submit": "send a run to a cluster as a job, show its log, and end with its exit code",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 a mistake in the arguments or the configuration, 130 or
    143 asked to stop."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser(given[0] if given else "").parse_args(given)
    if args.stage in COMMANDS:
        return int(_module(args.stage).command(args))
    try:
        config = load(args.config, args.overrides)
        if args.stage != "cohort":
            check_named(config)
        if args.dry_run:
            from pipelines.plan import describe

            print(describe(config, _stages(args.stage, config)))
            return 0
        return _run(args.stage, config)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)


def _parser(asked: str) -> argparse.ArgumentParser:
    """With the arguments of the command that is asked for; the others' modules are not imported."""
    parser = argparse.ArgumentParser(
        prog="medtvt-rl",
        description="Post-training of a language model that reads an ECG, a chest X-ray and blood values.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in HELP.items():
        stage = stages.add_parser(name, help=text, description=text)
        stage.add_argument("-c", "--config", required=True, help="YAML file with deviations from the defaults")
        stage.add_argument(
            "--dry-run", action="store_true", help="print configuration, batches and placement; start nothing"
        )
        stage.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    for name, text in COMMANDS.items():
        command = stages.add_parser(name, help=text, description=text)
        if name == asked:
            _module(name).add_arguments(command)
    return parser


def _module(command: str) -> ModuleType:
    return import_module(f"pipelines.{command.replace('-', '_')}")


def _stages(command: str, config: Config) -> list[str]:
    """What a command goes through."""
    return config.run.stages if command == "run" else [command]


def _run(stage: str, config: Config) -> int:
    """One stage, or all of them."""
    from pipelines.stages import StageError, check_finished, finished

    asked = _stages(stage, config)
    try:
        check_finished(asked, config)
    except StageError as error:
        return fail(str(error), EXIT_FAILED)
    if any(name in ("grpo", "evaluate") and finished(name, config) is None for name in asked):
        check_engine(config)
    return alone_in(config, lambda: _run_here(stage, config), keeps_checkpoints="grpo" in asked)


def _run_here(stage: str, config: Config) -> int:
    """The run folder is ours."""
    from pipelines.stages import finished, prepare_run_folder, run_stage

    prepare_run_folder(config)

    def work(reporter: Reporter) -> None:
        from pipelines import run as all_stages

        if stage == "run":
            all_stages.run(config, reporter)
            return
        run_stage(stage, config, reporter)
        if stage == "evaluate":
            all_stages.conclude(config, reporter)

    needs_actors = stage == "run" or (stage != "cohort" and finished(stage, config) is None)
    return in_session(config, work, with_ray=needs_actors)


if __name__ == "__main__":
    sys.exit(main())
