"""Reference ranges of the 50 laboratory items, and what one value is beside its range.

Owns: typical adult ranges, both sexes together (the lower limit of women, the higher of men, where they differ), a
table of the user's own in their place, and readings. Does not own: the items and their order (data/labs.py).
Three items (the serum indices H, I and L) have no range, and nothing is said of them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labs import LAB_IDS, LAB_ITEMS, lab_title, parse_number


@dataclass(frozen=True, slots=True)
class Range:
    """What is usual for one item, both limits included."""

    low: float
    high: float
    unit: str


# fmt: off
RANGES: dict[str, Range] = {
    "50802": Range(-2, 3, "mEq/L"), "50804": Range(21, 30, "mEq/L"), "50813": Range(0.5, 2.0, "mmol/L"),
    "50818": Range(35, 45, "mm Hg"), "50820": Range(7.35, 7.45, "units"), "50821": Range(85, 105, "mm Hg"),
    "50861": Range(0, 40, "IU/L"), "50862": Range(3.5, 5.2, "g/dL"), "50863": Range(35, 130, "IU/L"),
    "50868": Range(8, 20, "mEq/L"), "50878": Range(0, 40, "IU/L"), "50882": Range(22, 32, "mEq/L"),
    "50885": Range(0, 1.5, "mg/dL"), "50893": Range(8.4, 10.3, "mg/dL"), "50902": Range(96, 108, "mEq/L"),
    "50910": Range(29, 322, "IU/L"), "50912": Range(0.4, 1.2, "mg/dL"), "50931": Range(70, 105, "mg/dL"),
    "50960": Range(1.6, 2.6, "mg/dL"), "50970": Range(2.7, 4.5, "mg/dL"), "50971": Range(3.3, 5.1, "mEq/L"),
    "50983": Range(133, 145, "mEq/L"), "51006": Range(6, 20, "mg/dL"), "51133": Range(1.2, 3.7, "K/uL"),
    "51146": Range(0, 1, "%"), "51200": Range(1, 7, "%"), "51221": Range(34, 51, "%"),
    "51222": Range(11.2, 17.5, "g/dL"), "51237": Range(0.9, 1.1, "ratio"), "51244": Range(19, 53, "%"),
    "51248": Range(26, 32, "pg"), "51249": Range(32, 37, "g/dL"), "51250": Range(82, 98, "fL"),
    "51254": Range(5, 13, "%"), "51256": Range(34, 71, "%"), "51265": Range(150, 400, "K/uL"),
    "51274": Range(9.4, 12.5, "s"), "51275": Range(25, 36.5, "s"), "51277": Range(10.5, 15.5, "%"),
    "51279": Range(3.9, 6.1, "m/uL"), "51301": Range(4, 11, "K/uL"), "52069": Range(0.01, 0.08, "K/uL"),
    "52073": Range(0.04, 0.54, "K/uL"), "52074": Range(0.2, 0.8, "K/uL"), "52075": Range(1.6, 6.1, "K/uL"),
    "52135": Range(0, 0.6, "%"), "52172": Range(35.1, 46.3, "fL"),
}
# fmt: on
"""Item id -> its range."""

HIGH, LOW, NORMAL = "high", "low", "normal"
_COLUMNS = ("item", "low", "high", "unit")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabReading:
    """One measured value beside its range; `level` is "high", "low" or "normal"."""

    item: str
    value: float
    range: Range
    level: str

    def __str__(self) -> str:
        limits = f"reference {self.range.low:g} to {self.range.high:g}"
        return f"{LAB_ITEMS[self.item]} {self.value:g} {self.range.unit} ({limits}): {self.level}"


def readings(values: NDArray[np.float64], ranges: Mapping[str, Range]) -> tuple[LabReading, ...]:
    """The measured values [50] (NaN where not measured) that have a range, in the order of LAB_IDS."""
    found = []
    for item, value in zip(LAB_IDS, values.tolist()):
        limits = ranges.get(item)
        if limits is not None and not np.isnan(value):
            level = HIGH if value > limits.high else LOW if value < limits.low else NORMAL
            found.append(LabReading(item=item, value=value, range=limits, level=level))
    return tuple(found)


def read_ranges(path: Path | None) -> dict[str, Range]:
    """RANGES, with the rows of a CSV file of item (id), low, high, unit in their place.

    Raises:
        DataError: the file is missing, lacks a column, or a row has an unknown item or limits that are no range.
    """
    ranges = dict(RANGES)
    if path is None:
        return ranges
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: column {missing[0]} missing; expected {', '.join(_COLUMNS)}")
            for row in reader:
                item = (row["item"] or "").strip()
                ranges[item] = _range(f"{path}:{reader.line_num}", item, row)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check --lab-ranges") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file ({error}); export it again as UTF-8 text") from error
    return ranges


def _range(place: str, item: str, row: Mapping[str, str | None]) -> Range:
    if item not in LAB_ITEMS:
        raise DataError(f"{place}: column item: {item!r} is not one of the 50 item ids; use one such as 50912")
    low, high = (parse_number(row[name] or "", f"{name} of item {lab_title(item)}") for name in ("low", "high"))
    if not low <= high:
        raise DataError(f"{place}: item {lab_title(item)}: {low:g} to {high:g} is no range; write low <= high")
    return Range(low, high, (row["unit"] or "").strip())
