"""Reads the tables of a data root: one row per study, and the labels of findings.

Owns: the columns of the CSV files, and the checks that need no other file than the table. Does not own: ECG and film
files (study_build.py), or checks between splits (validation.py). A bad row becomes a Problem; a bad table is a
DataError.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.config import VALIDATION, DataConfig
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.labels import ALL_FINDINGS
from medtvt_rl.data.labs import LAB_IDS, PERCENTILE_SUFFIX, LabValues, labs_from_row
from medtvt_rl.data.paths import inside_root

_REQUIRED = ("subject_id", "ecg_path", "cxr_path", *LAB_IDS)
_PERCENTILES = tuple(item + PERCENTILE_SUFFIX for item in LAB_IDS)
_WHOLE_NUMBER = re.compile(r"-?\d+\.0")


def plain_id(cell: str) -> str:
    """An id, or a code, that a program may have turned into a number: " 22595853.0" -> "22595853"."""
    text = cell.strip()
    return text[:-2] if _WHOLE_NUMBER.fullmatch(text) else text


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One row of a split's table.

    Attributes:
        file, line: where it stands.
        ecg_path, cxr_path: relative to the data root; empty if not taken.
        labs: raw values and, if the table has them, percentiles.
    """

    split: str
    file: str
    line: int
    study_id: str
    patient_id: str
    ecg_path: str
    cxr_path: str
    labs: LabValues

    @property
    def location(self) -> str:
        """FILE:LINE."""
        return f"{self.file}:{self.line}"

    def problem(self, field: str, reason: str) -> Problem:
        """This row's problem with one of its fields."""
        return Problem(file=self.location, study_id=self.study_id, field=field, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRows:
    """What one table holds.

    Attributes:
        rows: the usable ones.
        problems: of the rows that were set aside.
        num_left_out: rows that data.only_rows does not take.
    """

    rows: list[StudyRow]
    problems: list[Problem]
    num_left_out: int


def read_rows(config: DataConfig, split: str) -> TableRows:
    """The rows of one split's table, those that data.validation_share takes out of it among them.

    Raises:
        DataError: the file is missing or lacks columns.
    """
    file, id_column = config.tables[split], config.id_column
    taken = config.validation_share if split == "train" and config.takes_validation else 0.0
    rows: list[StudyRow] = []
    problems: list[Problem] = []
    num_left_out = 0
    for line, cells in _table(Path(config.root), file, (id_column, *_REQUIRED), _PERCENTILES):
        if any(plain_id(cells.get(name, value)) != plain_id(value) for name, value in config.only_rows.items()):
            num_left_out += 1
            continue
        study_id = plain_id(cells.get(id_column, ""))
        try:
            rows.append(_row(cells, id_column, split, taken, file, line))
        except DataError as error:
            field = str(error).split(":", 1)[0].removeprefix("column ")
            problems.append(Problem(file=f"{file}:{line}", study_id=study_id, field=field, reason=str(error)))
    return TableRows(rows=rows, problems=problems, num_left_out=num_left_out)


def _row(cells: dict[str, str], id_column: str, split: str, taken: float, file: str, line: int) -> StudyRow:
    if "" in cells:
        raise DataError(f"row: {cells['']}; mend the commas and quotes of the row")
    for name in (id_column, "subject_id"):
        if not cells[name].strip():
            raise DataError(f"column {name}: empty; every row needs one")
    if "|" in cells[id_column]:
        raise DataError(f"column {id_column}: {cells[id_column]!r} holds '|', which is reserved; rename the study")
    patient_id = plain_id(cells["subject_id"])
    return StudyRow(
        split=VALIDATION if patient_place(patient_id) < taken else split,
        file=file,
        line=line,
        study_id=plain_id(cells[id_column]),
        patient_id=patient_id,
        ecg_path=cells["ecg_path"].strip(),
        cxr_path=cells["cxr_path"].strip(),
        labs=labs_from_row(cells),
    )


def patient_place(patient_id: str) -> float:
    """A number in 0..1 that depends on the patient alone, evenly spread over patients."""
    return int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8]) / 2**64


def read_findings(root: Path, file: str) -> tuple[dict[str, NDArray[np.bool_]], list[Problem]]:
    """Study id -> [20] bool in the order of ALL_FINDINGS, and the rows that were set aside.

    Raises:
        DataError: the file is missing or lacks columns.
    """
    findings: dict[str, NDArray[np.bool_]] = {}
    problems: list[Problem] = []
    for line, cells in _table(root, file, ("study_id", *ALL_FINDINGS), ()):
        study_id = plain_id(cells.get("study_id", ""))
        bad = next((key for key in ALL_FINDINGS if cells.get(key, "").strip() not in {"0", "1"}), None)
        if bad is not None or study_id in findings or not study_id:
            field = bad or "study_id"
            reason = f"is {cells.get(field, '')[:40]!r}, expected 0 or 1" if bad else "empty, or in two rows; keep one"
            problems.append(Problem(file=f"{file}:{line}", study_id=study_id, field=field, reason=reason))
            continue
        findings[study_id] = np.array([cells[key].strip() == "1" for key in ALL_FINDINGS])
    return findings, problems


def _table(
    root: Path, file: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, column -> cell). A row of the wrong length has the key "" with what is wrong."""
    path = inside_root(root, file, "table")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle)
            header = [name.strip() for name in next(reader, [])]
            _check_header(file, header, required, optional)
            for cells in reader:
                if not cells:
                    continue
                row = dict(zip(header, cells))
                if len(cells) != len(header):
                    row[""] = f"{len(cells)} cells, expected {len(header)}"
                yield reader.line_num, row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check data.root and the file names under data") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file ({error}); export it again as UTF-8 text") from error


def _check_header(file: str, header: list[str], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise DataError(
            f"{file}: {_listed('column', missing)} missing; add it, with empty cells where nothing is known"
        )
    lacking = [name for name in optional if name not in header]
    if lacking and len(lacking) < len(optional):
        raise DataError(f"{file}: {_listed('column', lacking)} missing though others are there; add all or none")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(f"{file}: {_listed('column', twice)} given twice; keep one")


def _listed(noun: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}"
