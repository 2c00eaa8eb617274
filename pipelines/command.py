"""What every command shares: reading its configuration, joining the cluster, errors as one line, exit codes.

Owns: the form of errors on the terminal, and the run's error log. Does not own: arguments (cli.py), or what a command
does.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from medtvt_rl.algorithm.config import ADVANTAGES, LOSSES
from medtvt_rl.config import Config, load_config
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.privacy import SaltError, open_for, prepare_salt
from medtvt_rl.rollout.config import SCALINGS

if TYPE_CHECKING:
    from medtvt_rl.model.llm_source import LlmSource
    from pipelines.reporter import Reporter

JOB_FOLDER = "runtime_resources/working_dir_files"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def load(path: str, overrides: Sequence[str]) -> Config:
    """The configuration. A submitted job runs in a copy of the working directory that is thrown away after it: there a
    relative `run.root` counts from the home folder, so that the run outlives the job."""
    config = load_config(path, overrides)
    root = Path(config.run.root)
    if JOB_FOLDER in Path.cwd().as_posix() and not root.is_absolute():
        return load_config(path, [*overrides, f"run.root={Path.home() / root}"])
    return config


def check_named(config: Config, runs_here: bool = True) -> None:
    """Imports what the configuration names by dotted paths, so that a mistake ends the run before anything starts.

    The current folder is searched, too, as Ray's workers do: a user's own rewards and tasks may lie there.

    Args:
        runs_here: False where another machine will run it, so that `model.init` may be there alone.

    Raises:
        ConfigError: a module or a name does not exist, a reward function does not take its options, or what
            `model.init` is to be written from is not installed.
    """
    from medtvt_rl.dotted import resolve
    from medtvt_rl.logs import quiet_environment
    from medtvt_rl.rewards.scorer import Scorer

    quiet_environment()
    check_placeable(config)
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    key = "rewards"
    try:
        if config.rewards:
            Scorer(config.rewards)
        for name in ("prompts", "examples", "items", "evaluate"):
            path, key = getattr(config.task, name), f"task.{name}"
            if path is not None:
                resolve(path, key)
        for key, path in _own_paths(config).items():
            resolve(path, key)
        if runs_here and config.task.items is None and config.model.init_from is None:
            _check_text_model(config)
        key = "model.init_from"
        if config.model.init_from is not None:
            folder, source = _init_from(config)
            if runs_here and not folder.exists():
                source.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # the modules are the user's code: importing one may raise anything
        raise ConfigError(f"{key}: a module that it names cannot be imported: {_one_line(error)}") from error


def check_placeable(config: Config) -> None:
    """Raises ConfigError for an accelerator that Ray does not know, or a label selector that it does not take."""
    roles = (getattr(config.placement, name) for name in ("rollout", "learner", "reference", "reward"))
    if any(role.accelerator or role.labels or role.fallbacks for role in roles):  # else Ray is not imported for nothing
        from actors.accelerators import check_accelerators
        from actors.label_selectors import check_labels

        check_accelerators(config.placement)
        check_labels(config.placement)


def check_engine(config: Config) -> None:
    """Raises ConfigError where the generators of a local run cannot start with the vLLM that is installed. Those of a
    cluster look at what their own node has."""
    from medtvt_rl.roles import node_kinds
    from medtvt_rl.rollout.build import check_build

    usual = config.rollout.make_engine == type(config.rollout).make_engine
    if usual and not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        faults: list[ValueError] = []
        for kind in node_kinds("rollout", config.placement.rollout):
            try:
                check_build(kind.gpus)
                return
            except ValueError as error:
                faults.append(error)
        raise ConfigError(str(faults[0])) from faults[0]


def _own_paths(config: Config) -> dict[str, str]:
    """Key -> dotted path of what the user brings in the place of the packages' own."""
    grpo, usual = config.grpo, Config()
    named = {
        "rollout.make_engine": (config.rollout.make_engine, (usual.rollout.make_engine,)),
        "learner.make_engine": (config.learner.make_engine, (usual.learner.make_engine,)),
        "rollout.scaling": (config.rollout.scaling, SCALINGS),
        "grpo.layout": (grpo.layout, (usual.grpo.layout,)),
        "grpo.advantage": (grpo.advantage, ADVANTAGES),
        "grpo.loss.kind": (grpo.loss.kind, LOSSES),
    }
    return {key: path for key, (path, known) in named.items() if path not in known}


def _check_text_model(config: Config) -> None:
    """Raises ValueError where `model.init` holds no language model."""
    folder = Path(config.model.init or ".")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if config.model.init is not None and missing:
        raise ValueError(
            f"model.init: {config.model.init!r} holds no {' and no '.join(missing)}; expected a Hugging Face folder of "
            "a causal language model with its tokenizer"
        )


def _init_from(config: Config) -> tuple[Path, LlmSource]:
    """`model.init` and what writes it."""
    from medtvt_rl.dotted import resolve
    from medtvt_rl.model.llm_source import LlmSource

    source = resolve(str(config.model.init_from), "model.init_from")
    if not isinstance(source, LlmSource):
        raise ValueError(f"model.init_from: {config.model.init_from!r} names no LlmSource; see model/llm_source.py")
    return Path(str(config.model.init)), source


def write_init(config: Config, reporter: Reporter) -> None:
    """Writes `model.init` from its source, where it isn't there yet."""

    def begin(words: str) -> None:
        reporter.line(words)
        reporter.start("model", unit="part")

    if written_init(config, begin, lambda done, total: reporter.update(done, total=total)):
        reporter.finish("model")


def written_init(config: Config, begin: Callable[[str], None], update: Callable[[int, int], None]) -> bool:
    """Whether `model.init` had to be written from its source; `begin` is told so first, `update` parts done of all.

    Raises:
        ValueError: the source is none, or its package is missing.
    """
    if config.model.init_from is None:
        return False
    from medtvt_rl.learner.process_group import prepare_environment
    from medtvt_rl.model.llm_source import is_ready, write_folder

    prepare_environment(config.pretrain.num_threads)
    folder, source = _init_from(config)
    if is_ready(source, folder):
        return False
    source.check()
    begin(f"model: writing {source.name} to {folder}, once")
    write_folder(source, folder, update)
    return True


def alone_in(config: Config, work: Callable[[], int], keeps_checkpoints: bool = False) -> int:
    """What a command that uses the run folder returns, which no other one may use meanwhile.

    Args:
        keeps_checkpoints: it writes and removes those of GRPO.

    Raises:
        ConfigError: the folder cannot be written.
    """
    from pipelines.run_lock import RunInUseError, run_lock

    with ExitStack() as held:
        try:
            held.enter_context(run_lock(config.folder, tell))
            if keeps_checkpoints:
                _hold_checkpoints(config, held)
        except RunInUseError as error:
            return fail(str(error), EXIT_FAILED)
        except KeyboardInterrupt:
            return fail("SIGINT: nothing was started", EXIT_INTERRUPTED)
        except OSError as error:
            raise ConfigError(unwritable(config, error)) from error
        return work()


def _hold_checkpoints(config: Config, held: ExitStack) -> None:
    """Another run.root may have a run of the same name; where the folder cannot be written, that is told as it is of
    each checkpoint."""
    from pipelines.run_lock import CHECKPOINTS_LOCK, checkpoint_folder, not_locked, run_lock

    folder = checkpoint_folder(config)
    if folder is not None:
        try:
            held.enter_context(run_lock(folder, tell, name=CHECKPOINTS_LOCK))
        except OSError as error:
            tell(not_locked(folder, error))


def in_session(config: Config, work: Callable[[Reporter], None], with_ray: bool) -> int:
    """Joins or starts the cluster, works, and turns what is raised into one line and an exit code."""
    from medtvt_rl.logs import quiet_third_parties

    try:
        quiet_third_parties(config.folder / "logs")
        prepare_salt(config.privacy, config.folder)
    except SaltError as error:
        return fail(str(error), EXIT_USAGE)
    except OSError as error:
        return fail(unwritable(config, error), EXIT_USAGE)
    open_for(config.privacy, config.folder)
    from actors.placement import logical_cpus
    from actors.run_folder import mark_run_folder
    from actors.session import ray_session
    from pipelines.reporter import Reporter
    from pipelines.stopping import Stopped, stop_at_once, stopped_at_once

    try:
        session = ray_session(config, logical_cpus(config)) if with_ray else nullcontext()
        with Reporter(config.folder) as reporter:
            if with_ray:
                write_init(config, reporter)
            with session:
                quiet_third_parties(config.folder / "logs")
                stop_at_once()  # Ray has set a handler of its own
                if with_ray:
                    mark_run_folder(config.folder)
                work(reporter)
    except KeyboardInterrupt:
        stopped = stopped_at_once()
        return fail(str(stopped), stopped.exit_code)
    except Stopped as stopped:
        return fail(str(stopped), stopped.exit_code)
    except Exception as error:
        return fail(f"{_one_line(error)} (details: {_save_traceback(config)})", EXIT_FAILED)
    return 0


def unwritable(config: Config, error: OSError) -> str:
    """What is said of a run folder in which nothing can be written."""
    return f"run.root is {config.run.root!r}: {error}; choose a folder that can be written"


def positive(text: str) -> int:
    """The type of an argument that counts something, for argparse."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def tell(text: str) -> None:
    """One line on stderr."""
    print(f"medtvt-rl: {text}", file=sys.stderr, flush=True)


def fail(text: str, code: int) -> int:
    """Tells what went wrong, and returns the exit code."""
    tell(text)
    return code


def _one_line(error: BaseException) -> str:
    """The error's own words: of a Ray task's error, those of what it was caused by."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return _one_line(cause)
    text = " ".join(str(error).split())
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or os.strerror(errno.ENOSPC) in text:
        where = getattr(error, "filename", None) or text
        return f"a disk is full ({where}); make room, and the same command goes on from what is kept"
    expected = isinstance(error, (ValueError, RuntimeError)) and not type(error).__module__.startswith("ray")
    return text if expected and text else f"{type(error).__name__}: {text}"


def _save_traceback(config: Config) -> str:
    path, text = config.folder / "logs" / "error.log", traceback.format_exc()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat()}\n{text}\n")
    except OSError as error:  # a full disk may be what ended the run
        return f"none, {path} cannot be written: {error}"
    return str(path)
