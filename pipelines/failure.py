"""The report of a run that ended for want of a role: failure.json in the run folder, and one line.

Owns: its form. Does not own: when a role is lost (actors/).
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from medtvt_rl.config import Config
from medtvt_rl.faults import RoleLostError
from pipelines.stages import write_json

FAILURE_FILE = "failure.json"


def write_failure(config: Config, newest: str | None, error: RoleLostError) -> RoleLostError:
    """Writes the report: role, node, cause and last words of each loss, and where the run goes on. The error to raise
    in its place names the file, or says why there is none.

    Args:
        newest: place of the newest checkpoint, as it is known: the store may be what is out of reach.
    """
    path = config.folder / FAILURE_FILE
    report = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "reason": str(error),
        "incidents": [asdict(incident) for incident in error.incidents],
        "checkpoint": newest,
    }
    try:
        write_json(path, report)
        where = f"report: {path}"
    except OSError as full:
        where = f"no report: {full}"
    goes_on = f"the same command goes on from {newest}" if newest else "there is no checkpoint yet"
    told = RoleLostError(f"{_short(str(error))}; {goes_on}; {where}", error.incidents)
    told.__cause__ = error
    return told


def forget_failure(config: Config) -> None:
    """Takes away the report of an earlier attempt."""
    Path(config.folder / FAILURE_FILE).unlink(missing_ok=True)


def _short(reason: str, limit: int = 600) -> str:
    return reason if len(reason) <= limit else f"{reason[:limit]}..."
