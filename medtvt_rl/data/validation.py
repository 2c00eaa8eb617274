"""Checks between studies: ids that occur twice, and patients in two splits.

Owns: these checks and the list of problems as a file. Does not own: checks within a row (study_rows.py) or a file
(ecg.py, cxr.py).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from medtvt_rl.data.errors import Problem
from medtvt_rl.data.study_rows import StudyRow

_COLUMNS = ("file", "study_id", "field", "reason")


def check_ids(rows: Sequence[StudyRow], splits: Sequence[str]) -> tuple[list[StudyRow], list[Problem]]:
    """The rows whose study and patient are unambiguous, and the problems of the rest.

    A study id twice in one split is refused both times, since nothing says which is right. A study or a patient in
    two splits stays in the later of `splits` only (train, validation, test), so that what is held out is never
    trained on.
    """
    rank = {split: position for position, split in enumerate(splits)}
    by_study, by_patient = defaultdict(list), defaultdict(list)
    for row in rows:
        by_study[row.study_id].append(row)
        by_patient[row.patient_id].append(row)
    kept, problems = [], []
    for row in rows:
        problem = _study_problem(row, by_study[row.study_id], rank) or _patient_problem(
            row, by_patient[row.patient_id], rank
        )
        if problem:
            problems.append(problem)
        else:
            kept.append(row)
    return kept, problems


def _study_problem(row: StudyRow, same: list[StudyRow], rank: dict[str, int]) -> Problem | None:
    others = [other for other in same if other is not row]
    twin = next((other for other in others if other.split == row.split), None)
    if twin is not None:
        return row.problem(
            "study_id", f"study {row.study_id} stands in line {twin.line} of {twin.file} too; keep one row"
        )
    later = next((other for other in others if rank[other.split] > rank[row.split]), None)
    if later is not None:
        return row.problem("study_id", f"study {row.study_id} is in split {later.split} too; keep it in one split")
    return None


def _patient_problem(row: StudyRow, same: list[StudyRow], rank: dict[str, int]) -> Problem | None:
    later = next((other for other in same if rank[other.split] > rank[row.split]), None)
    if later is None:
        return None
    return row.problem(
        "subject_id",
        f"patient {row.patient_id} is in split {later.split} too (study {later.study_id}); keep a patient in one split",
    )


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Writes problems as a CSV file: file, study_id, field, reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([p.file, p.study_id, p.field, p.reason] for p in problems)


def read_problems(path: Path) -> tuple[Problem, ...]:
    """Reads what `write_problems` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(Problem(**{name: row[name] for name in _COLUMNS}) for row in csv.DictReader(file))
