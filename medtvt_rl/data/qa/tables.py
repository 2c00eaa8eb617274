"""Reads the rows of a big table that belong to known ids, in bounded memory.

Owns: opening (also .gz), the check of columns, the choice of rows. Does not own: what the columns mean (labels.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import compute, csv

from medtvt_rl.data.errors import DataError


def rows_of(
    path: Path, key: str, wanted: Collection[str], columns: tuple[str, ...], pattern: str | None = None
) -> Iterator[dict[str, str]]:
    """Yields column -> text for the rows whose `key` is one of `wanted`, in the order of the file.

    Args:
        columns: those that the table must have, beside `key`.
        pattern: a regular expression; columns whose whole name it matches come along where the table has them.

    Raises:
        DataError: the file is missing, is no CSV file, or lacks a column.
    """
    needed = [key, *columns]
    try:
        names = _names(path)
        missing = [name for name in needed if name not in names]
        if missing:
            raise DataError(f"{path}: column {', '.join(missing)} missing among the {len(names)} of its first line")
        more = [name for name in names if pattern and re.fullmatch(pattern, name) and name not in needed]
        taken = [*needed, *more]
        options = csv.ConvertOptions(include_columns=taken, column_types=dict.fromkeys(taken, pa.string()))
        values = pa.array(sorted(wanted), pa.string())
        with csv.open_csv(path, convert_options=options, parse_options=_PARSE) as reader:
            for batch in reader:
                chosen = batch.filter(compute.is_in(compute.utf8_trim_whitespace(batch.column(key)), values))
                yield from ({name: text.strip() for name, text in row.items()} for row in chosen.to_pylist())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path of the table") from None
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file ({_reason(error)}); fetch it again") from error


_NUMBERS = re.compile(r"(?:Row #\d+: )?Expected \d+ columns, got \d+")
_PARSE = csv.ParseOptions(newlines_in_values=True)


def _names(path: Path) -> list[str]:
    with csv.open_csv(path, parse_options=_PARSE) as reader:
        return [str(name) for name in reader.schema.names]


def _reason(error: Exception) -> str:
    """What is wrong, without the row that Arrow quotes: it is a patient's."""
    found = _NUMBERS.search(str(error))
    return found[0] if found else type(error).__name__
