"""One driver uses a run folder at a time: a lock on a file in it, which goes with the process that holds it.

Owns: RUN/logs/lock, which says who holds it, and the wait for that one's end: a job that was asked to stop still writes
its checkpoint. A folder of checkpoints outside the run folder has one of its own: runs of one name may share it. Does
not own: what is written under it. Who only reads a run (study) takes no lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medtvt_rl.config import Config

LOCK, CHECKPOINTS_LOCK = Path("logs") / "lock", Path("lock")
WAIT_S, POLL_S = 30.0, 0.5

_held = set[int]()


class RunInUseError(RuntimeError):
    """Another driver writes this run folder; the message says which, and the mend."""


@contextmanager
def run_lock(folder: Path, tell: Callable[[str], None], wait_s: float = WAIT_S, name: Path = LOCK) -> Iterator[None]:
    """Holds the folder, which appears with it. Where its file system has no locks this is told, and nothing held.

    Raises:
        RunInUseError: another driver held it for `wait_s`.
        OSError: the folder cannot be written.
    """
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    # Ray's processes do not inherit it, for Python opens files so that they are closed in programs that it starts.
    lock = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(lock)
    try:
        _take(lock, folder, tell, wait_s)
        yield
    finally:
        _held.discard(lock)
        os.close(lock)


def checkpoint_folder(config: Config) -> Path | None:
    """Where the checkpoints lie, if that is a folder which the lock of the run folder does not cover."""
    from medtvt_rl.storage import Storage

    storage = Storage(config.checkpoint_root)
    folder = Path(storage.root)
    return folder if storage.is_local and not folder.is_relative_to(config.folder.resolve()) else None


def _take(lock: int, folder: Path, tell: Callable[[str], None], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    has_told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                tell(not_locked(folder, error))
                return
        holder = os.pread(lock, 1000, 0).decode(errors="replace").strip() or "another driver"
        if time.monotonic() >= deadline:
            raise RunInUseError(
                f"{folder} is in use by {holder}; wait for its end, or end it (`ray job stop` for a job, else `kill`), "
                "or choose another run.name"
            )
        if not has_told:
            tell(f"{folder} is in use by {holder}; waiting up to {wait_s:g} s for its end")
            has_told = True
        time.sleep(POLL_S)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    os.fsync(lock)  # a driver on another node reads it


def not_locked(folder: Path, error: OSError) -> str:
    """What is said of a folder that is used without a lock."""
    return f"{folder} cannot be locked ({error}): see to it yourself that no other driver writes it"


def _let_go() -> None:
    """In a forked child: it must not hold the folder for longer than its parent."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
