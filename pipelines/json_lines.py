"""Files of one JSON object a line, which a crash may have cut short."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a line that a crash cut short is skipped, a missing file is no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def keep_rows(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drops rows of a file, which is whole or as it was, also after a power cut."""
    if not path.is_file():
        return
    kept = "".join(json.dumps(row) + "\n" for row in read_rows(path) if is_kept(row))
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(kept)
        sync(file)
    temporary.replace(path)


def sync(file: IO[Any]) -> None:
    """What was written to a file survives a power cut from now on."""
    file.flush()
    os.fsync(file.fileno())
