"""The command line: `medtvt-rl STAGE -c configs/X.yaml key=value ...`.

Owns: arguments, the one-line form of errors, exit codes. Does not own: what a stage does.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from medtvt_rl.config import Config, load_config
from medtvt_rl.config_checks import ConfigError

if TYPE_CHECKING:
    from pipelines.reporter import Reporter

HELP = {
    "run": "all stages of run.stages, then the report; a finished stage is not run again",
    "cohort": "write the simulated cohort (if configured) and build the study store",
    "pretrain": "train the encoders' stand-in and explain each modality alone",
    "sft": "supervised fine-tuning on chains of evidence",
    "grpo": "reinforcement learning with the Jaccard reward",
    "evaluate": "held-out evaluation before and after GRPO",
}
JOB_FOLDER = "runtime_resources/working_dir_files"
EXIT_FAILED, EXIT_USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 a mistake in the arguments or the configuration."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.stage == "diagnose":
        from pipelines import diagnose

        return diagnose.run(args)
    if args.stage == "replay":
        return _replay(args)
    try:
        config = _load(args.config, args.overrides)
        if args.stage != "cohort":
            check_named(config)
        if args.dry_run:
            from pipelines.plan import describe

            print(describe(config))
            return 0
        return _run(args.stage, config)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
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
    _add_diagnose(stages)
    _add_replay(stages)
    return parser


def _add_diagnose(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from pipelines import diagnose

    text = "read one patient's ECG, film and blood values, and name the diagnoses"
    diagnose.add_arguments(stages.add_parser("diagnose", help=text, description=text))


def _add_replay(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "repeat recorded GRPO steps of a run and compare the weights bit for bit"
    replay = stages.add_parser("replay", help=text, description=text)
    replay.add_argument("run", type=Path, help="folder of the run, e.g. runs/quickstart")
    replay.add_argument("--from-step", type=int, default=0, metavar="A", help="0, or a step with a checkpoint")
    replay.add_argument("--to-step", type=int, metavar="B", help="default: the last step of the journal")


def _load(path: str, overrides: Sequence[str]) -> Config:
    """The configuration. A submitted job runs in a copy of the working directory that is thrown away after it: there a
    relative `run.root` counts from the home folder, so that the run outlives the job."""
    config = load_config(path, overrides)
    root = Path(config.run.root)
    if JOB_FOLDER in Path.cwd().as_posix() and not root.is_absolute():
        return load_config(path, [*overrides, f"run.root={Path.home() / root}"])
    return config


def check_named(config: Config) -> None:
    """Imports what the configuration names by dotted paths, so that a mistake ends the run before anything starts.

    The current folder is searched, too, as Ray's workers do: a user's own rewards and tasks may lie there.

    Raises:
        ConfigError: a module or a name does not exist, or a reward function does not take its options.
    """
    from medtvt_rl.dotted import resolve
    from medtvt_rl.logs import quiet_environment
    from medtvt_rl.rewards.scorer import Scorer

    quiet_environment()
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    key = "rewards"
    try:
        if config.rewards:
            Scorer(config.rewards)
        for name in ("prompts", "items", "evaluate"):
            path, key = getattr(config.task, name), f"task.{name}"
            if path is not None:
                resolve(path, key)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # the modules are the user's code: importing one may raise anything
        raise ConfigError(f"{key}: a module that it names cannot be imported: {_one_line(error)}") from error


def _run(stage: str, config: Config) -> int:
    """One stage, or all of them."""
    from pipelines.stages import StageError, check_finished, prepare_run_folder, run_stage

    try:
        check_finished(config.run.stages if stage == "run" else [stage], config)
    except StageError as error:
        return _fail(str(error), EXIT_FAILED)
    prepare_run_folder(config)

    def work(reporter: Reporter) -> None:
        if stage == "run":
            from pipelines import run as all_stages

            all_stages.run(config, reporter)
        else:
            run_stage(stage, config, reporter)

    return _in_session(config, work, with_ray=stage != "cohort")


def _replay(args: argparse.Namespace) -> int:
    from pipelines import replay

    try:
        config = replay.load_run(args.run)
        check_named(config)
        lines = replay.check(config, args.from_step, args.to_step)
    except (ValueError, replay.ReplayError) as error:
        return _fail(str(error), EXIT_USAGE)
    return _in_session(config, lambda reporter: replay.run(config, lines, reporter), with_ray=True)


def _in_session(config: Config, work: Callable[[Reporter], None], with_ray: bool) -> int:
    """Joins or starts the cluster, works, and turns what is raised into one line and an exit code."""
    from medtvt_rl.logs import quiet_third_parties

    quiet_third_parties(config.folder / "logs")
    from actors.placement import logical_cpus
    from actors.session import ray_session
    from pipelines.reporter import Reporter

    try:
        session = ray_session(config, logical_cpus(config)) if with_ray else nullcontext()
        with Reporter(config.folder) as reporter, session:
            quiet_third_parties(config.folder / "logs")
            work(reporter)
    except KeyboardInterrupt:
        return _fail("interrupted; finished stages are kept, and the same command goes on from there", EXIT_FAILED)
    except Exception as error:
        return _fail(f"{_one_line(error)} (details: {_save_traceback(config)})", EXIT_FAILED)
    return 0


def _one_line(error: BaseException) -> str:
    """The error's own words: of a Ray task's error, those of what it was caused by."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return _one_line(cause)
    text = " ".join(str(error).split())
    expected = isinstance(error, (ValueError, RuntimeError)) and not type(error).__module__.startswith("ray")
    return text if expected and text else f"{type(error).__name__}: {text}"


def _save_traceback(config: Config) -> str:
    path = config.folder / "logs" / "error.log"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat()}\n{traceback.format_exc()}\n")
    return str(path)


def _fail(text: str, code: int) -> int:
    print(f"medtvt-rl: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
