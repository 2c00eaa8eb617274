"""Where the words of a process go: a terminal shows the run, everything else lies in files under the run's logs/.

Owns: the environment and the logging set-up that quieten third parties, the redirection of an actor's output, and
reading the end of a log. Does not own: what a stage says about its progress (pipelines/reporter.py).
Needs the standard library only, so that it can run before anything heavy is imported.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import TextIO

# Set only where the user has not; workers on other nodes receive it through Ray's runtime_env.
QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
NOISY_LOGGERS = ("DeepSpeed", "datasets", "py.warnings", "ray", "transformers", "vllm")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def quiet_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Adds QUIET_ENVIRONMENT to `environ`; what the user has set stays."""
    for name, value in QUIET_ENVIRONMENT.items():
        environ.setdefault(name, value)


def quiet_third_parties(log_folder: str | Path, level: int = logging.INFO) -> Path:
    """Sends Python logging and warnings of this process to `log_folder`/driver.log, none of it to the terminal.

    Call it before the heavy imports, so that the environment counts, and once more after `ray.init`: Ray gives its
    logger a terminal handler when it is imported. Calling it again never writes a record twice.

    Returns:
        The log file.
    """
    quiet_environment()
    folder = Path(log_folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "driver.log").resolve()
    handler = _file_handler(path)
    root = logging.getLogger()
    root.setLevel(min(level, root.level or level))
    if handler not in root.handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a log that cannot be written, e.g. on a full disk, is no reason to print a stack
    threading.excepthook = _log_thread
    for name in NOISY_LOGGERS:
        logger = logging.getLogger(name)
        # FileHandler is a StreamHandler, too: a library's own files stay, its terminal handlers go.
        for old in [h for h in logger.handlers if not isinstance(h, logging.FileHandler)]:
            logger.removeHandler(old)
        logger.propagate = True
    return path


def _log_thread(args: threading.ExceptHookArgs) -> None:
    """A thread of a library that fails: what depends on it says so itself."""
    if args.exc_value is not None:
        trace = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("threads").error("thread %s failed", args.thread and args.thread.name, exc_info=trace)


def _file_handler(path: Path) -> logging.FileHandler:
    """The root logger's handler that writes to `path`, or a new one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.baseFilename == str(path):
            return handler
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter(FORMAT))
    return handler


def redirect_output(path: str | Path) -> Path:
    """Appends everything that this process prints from now on, from C and C++ code too, to the file `path`.

    For actors: call it first in the constructor. A crash of the interpreter leaves its Python stack in the file.

    Returns:
        The absolute path, for messages that name it.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _flush_streams()
    descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = _line_buffered(sys.stdout, 1), _line_buffered(sys.stderr, 2)
    faulthandler.enable(file=2)
    return target


def _line_buffered(stream: TextIO, descriptor: int) -> TextIO:
    """`stream` itself if it writes to `descriptor`, else a new one that does; the descriptor outlives either."""
    if isinstance(stream, io.TextIOWrapper) and not stream.closed and stream.fileno() == descriptor:
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        return stream
    return os.fdopen(descriptor, "w", buffering=1, errors="backslashreplace", closefd=False)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def last_lines(path: str | Path, count: int = 20, max_bytes: int = 65536) -> list[str]:
    """The last `count` lines of a log that say something, for the report of a dead actor; of a bar of progress how far
    it came. Empty if the file does not exist."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line][-count:]
