"""How the failure of an actor reads: one line of cause, and the end of the actor's own log.

Owns: the words. Does not own: what becomes of the actor.
"""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import RayActorError, RayTaskError

from medtvt_rl.logs import last_lines

LOG_LINES = 12
LONGEST_CAUSE = 400
WHY_DEAD, ADVICE = "The actor is dead because ", " Some common causes include"
"""Ray's words before what is known of a death, and before what it might have been."""


class ActorError(RuntimeError):
    """An actor failed; the first line names it and the cause, the others are the end of its log."""


class ArgumentLostError(ActorError):
    """An actor cannot do what it was asked for: what it was to do it with went down with the node that held it."""


def cause_of(error: BaseException) -> str:
    """The cause in one line; Ray's own text of it is a whole traceback."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return cause_of(error.cause)
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    _, _, known = str(error).partition(WHY_DEAD) if isinstance(error, RayActorError) else ("", "", "")
    why = " ".join(known.partition(ADVICE)[0].split())
    return f"{type(error).__name__}: {lines[0]}{f' {why}' if why else ''}"[:LONGEST_CAUSE]


def log_tail(log: Path) -> tuple[str, ...]:
    """The last lines of a log, if there are any; to be read at the loss, for successors write into the same file."""
    return tuple(last_lines(log, LOG_LINES))


def with_log(message: str, log: Path) -> str:
    """The message, and below it the last lines of the log, if there are any."""
    tail = "".join(f"\n  {line}" for line in log_tail(log))
    return f"{message}\nend of {log}:{tail}" if tail else message
