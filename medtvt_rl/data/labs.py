"""Reads laboratory values: a row of a split's CSV, the mean percentiles, one patient's own file.

Owns: the 50 items, their order (that of the item-id strings), numbers and their errors, and the percentile table
fitted to the training split. Does not own: which row belongs to which study (study_rows.py), or what the model makes
of them (task.py).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.errors import DataError

PERCENTILES_FILE = "labs_percentiles.json"
"""The percentile table beside a trained model, with which it reads a new patient's raw values."""
LAB_ITEMS: dict[str, str] = {
    "50802": "Base Excess",
    "50804": "Calculated Total CO2",
    "50813": "Lactate",
    "50818": "pCO2",
    "50820": "pH",
    "50821": "pO2",
    "50861": "Alanine Aminotransferase (ALT)",
    "50862": "Albumin",
    "50863": "Alkaline Phosphatase",
    "50868": "Anion Gap",
    "50878": "Asparate Aminotransferase (AST)",
    "50882": "Bicarbonate",
    "50885": "Bilirubin, Total",
    "50893": "Calcium, Total",
    "50902": "Chloride",
    "50910": "Creatine Kinase (CK)",
    "50912": "Creatinine",
    "50931": "Glucose",
    "50934": "H",
    "50947": "I",
    "50960": "Magnesium",
    "50970": "Phosphate",
    "50971": "Potassium",
    "50983": "Sodium",
    "51006": "Urea Nitrogen",
    "51133": "Absolute Lymphocyte Count",
    "51146": "Basophils",
    "51200": "Eosinophils",
    "51221": "Hematocrit",
    "51222": "Hemoglobin",
    "51237": "INR(PT)",
    "51244": "Lymphocytes",
    "51248": "MCH",
    "51249": "MCHC",
    "51250": "MCV",
    "51254": "Monocytes",
    "51256": "Neutrophils",
    "51265": "Platelet Count",
    "51274": "PT",
    "51275": "PTT",
    "51277": "RDW",
    "51279": "Red Blood Cells",
    "51301": "White Blood Cells",
    "51678": "L",
    "52069": "Absolute Basophil Count",
    "52073": "Absolute Eosinophil Count",
    "52074": "Absolute Monocyte Count",
    "52075": "Absolute Neutrophil Count",
    "52135": "Immature Granulocytes",
    "52172": "RDW-SD",
}
"""Item id -> name, in the order of every vector of 50."""

LAB_IDS: tuple[str, ...] = tuple(LAB_ITEMS)
NUM_LABS = len(LAB_IDS)
PERCENTILE_SUFFIX = "_percentile"
_MISSING = {"", "nan", "null", "none", "na"}


def lab_title(item_id: str) -> str:
    """How messages name an item: "50912 (Creatinine)"."""
    return f"{item_id} ({LAB_ITEMS[item_id]})"


def parse_number(text: str, field: str) -> float:
    """The number in a cell; NaN where the cell is empty. Raises DataError for text and for infinity, naming `field`."""
    stripped = text.strip()
    if stripped.lower() in _MISSING:
        return math.nan
    try:
        value = float(stripped)
    except ValueError:
        raise DataError(
            f"column {field}: {stripped[:40]!r} is not a number; write one, or leave the cell empty"
        ) from None
    if not math.isfinite(value):
        raise DataError(f"column {field}: {stripped[:40]!r} is not finite; write a number, or leave the cell empty")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LabValues:
    """The laboratory values of one study.

    Attributes:
        values: [50] float64, in the laboratory's units; NaN where not measured.
        percentiles: [50] float32 in 0..1; NaN where not measured. None where the file has no percentile columns.
    """

    values: NDArray[np.float64]
    percentiles: NDArray[np.float32] | None

    @property
    def measured(self) -> NDArray[np.bool_]:
        """[50], which were measured."""
        return ~np.isnan(self.values)


def labs_from_row(row: Mapping[str, str]) -> LabValues:
    """The 50 values of one CSV row: a column per item id and, unless the file has none, ID_percentile beside it.

    Raises:
        DataError: text in a number, a percentile outside 0..1, or a value and its percentile of which one is missing.
    """
    values = np.array([parse_number(row[item], item) for item in LAB_IDS])
    if LAB_IDS[0] + PERCENTILE_SUFFIX not in row:
        return LabValues(values=values, percentiles=None)
    names = [item + PERCENTILE_SUFFIX for item in LAB_IDS]
    percentiles = np.array([parse_number(row[name], name) for name in names], dtype=np.float32)
    outside = np.flatnonzero((percentiles < 0) | (percentiles > 1))
    if len(outside):
        name = names[outside[0]]
        raise DataError(f"column {name}: {row[name].strip()} is outside 0..1; write the percentile as a share")
    unpaired = np.flatnonzero(np.isnan(values) != np.isnan(percentiles))
    if len(unpaired):
        item = LAB_IDS[unpaired[0]]
        have, lack = (item, names[unpaired[0]]) if np.isnan(percentiles[unpaired[0]]) else (names[unpaired[0]], item)
        raise DataError(f"column {lack}: empty, though {have} is filled; fill both or neither")
    return LabValues(values=values, percentiles=percentiles)


@dataclass(frozen=True, slots=True)
class PercentileTable:
    """The empirical distribution of each item in the training split.

    Attributes:
        samples: 50 sorted float64 arrays of measured values.
    """

    samples: tuple[NDArray[np.float64], ...]

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> PercentileTable:
        """From raw training values [N, 50] with NaN where not measured."""
        return cls(tuple(np.sort(column[~np.isnan(column)]) for column in values.T))

    def percentiles(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """The share of training values at or below each value: [..., 50] -> [..., 50] float32.

        NaN where the value is NaN, or where the training split never measured the item.
        """
        result = np.full(values.shape, np.nan, dtype=np.float32)
        for index, sample in enumerate(self.samples):
            column = values[..., index]
            if len(sample):
                share = np.searchsorted(sample, column, side="right") / len(sample)
                result[..., index] = np.where(np.isnan(column), np.nan, share)
        return result

    def mean_percentiles(self) -> NDArray[np.float32]:
        """[50] float32, the mean percentile of the training split; 0.5 for an item that it never measured."""
        means = [np.searchsorted(s, s, side="right").mean() / len(s) if len(s) else 0.5 for s in self.samples]
        return np.array(means, dtype=np.float32)

    def smoothed(self, num_quantiles: int = 200) -> PercentileTable:
        """The same distributions as interpolated quantiles, to travel with a model without any patient's own values."""
        places = (np.arange(num_quantiles) + 0.5) / num_quantiles
        quantiles = (np.asarray(np.quantile(s, places), dtype=np.float64) if len(s) else s for s in self.samples)
        return PercentileTable(tuple(quantiles))

    def save(self, path: Path) -> None:
        """Writes json: item id -> sorted values."""
        path.write_text(json.dumps({item: sample.tolist() for item, sample in zip(LAB_IDS, self.samples)}))

    @classmethod
    def load(cls, path: Path) -> PercentileTable:
        """Reads what `save` wrote. Raises DataError if it is not that."""
        content = read_json(path)
        if not isinstance(content, dict) or set(content) != set(LAB_IDS):
            raise DataError(f"{path}: not a percentile table of the 50 items; build the study store again")
        return cls(tuple(np.asarray(content[item], dtype=np.float64) for item in LAB_IDS))


def read_json(path: Path) -> Any:
    """The content of a json file. Raises DataError if it is missing or is not json."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path in the configuration") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not json, a number of thousands of digits, or too deep
        raise DataError(f"{path}: not valid json ({error}); export it again") from error


def read_labs_means(path: Path) -> NDArray[np.float32]:
    """[50] float32 mean percentiles from json, item id or ID_percentile -> share. Raises DataError naming the item."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of item id -> mean percentile, found {type(content).__name__}")
    means = []
    for item in LAB_IDS:
        value = content.get(item, content.get(item + PERCENTILE_SUFFIX))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DataError(f"{path}: item {lab_title(item)} is {str(value)[:40]!r}, expected a number in 0..1")
        means.append(value)
    return np.array(means, dtype=np.float32)


def read_patient_labs(path: Path) -> NDArray[np.float64]:
    """One patient's raw values [50] float64, NaN where not given.

    The file is a json object or a CSV of two columns (with or without a heading), item id or name -> value.

    Raises:
        DataError: an unknown item, an item given twice, or text in a number.
    """
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path}: expected an object of item -> value, found {type(content).__name__}")
        pairs = [(str(name), "" if value is None else str(value)) for name, value in content.items()]
    else:
        pairs = _two_columns(path)
    index = {name.lower(): i for i, names in enumerate(LAB_ITEMS.items()) for name in names}
    values = np.full(NUM_LABS, np.nan)
    for name, text in pairs:
        position = index.get(name.strip().lower())
        if position is None:
            raise DataError(
                f"{path}: {name[:40]!r} is not one of the 50 items; use an item id or name such as 50912, Creatinine"
            )
        if not math.isnan(values[position]):
            raise DataError(f"{path}: item {lab_title(LAB_IDS[position])} is given twice; keep one")
        try:
            values[position] = parse_number(text, name)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    return values


def _two_columns(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file ({error}); export it again as UTF-8 text") from error
    if rows and len(rows[0]) >= 2 and rows[0][1].strip().lower() in {"value", "result", "valuenum"}:
        rows = rows[1:]
    short = next((i for i, row in enumerate(rows) if len(row) != 2), None)
    if short is not None:
        raise DataError(f"{path}: entry {short + 1} has {len(rows[short])} cells, expected two: item, value")
    return [(row[0], row[1]) for row in rows]
