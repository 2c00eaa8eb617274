"""What a walk over the data found: issues, how often each occurred, and counts of what is there.

Owns: the levels of an issue, the bounded list of them, the files that hold it. Does not own: finding issues, or their
form on a terminal (pipelines/check_data.py).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from medtvt_rl.data.errors import Problem

Level = Literal["stop", "left out", "look"]
LEVELS: tuple[Level, ...] = ("stop", "left out", "look")
MAX_LISTED = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One thing that is wrong or odd.

    Attributes:
        check: the check that found it.
        level: "stop": training would stop, or would learn from data that is wrong throughout; "left out": this study or
            entry is not used; "look": it is used, and odd.
        split: empty where the issue belongs to none.
        file: relative to the data root, with line or entry; empty where the issue belongs to none.
        study_id: empty where none is known.
        field: the column or key.
        reason: what is wrong and how to mend it, one line; may hold values and text of a patient.
    """

    check: str
    level: Level
    split: str
    file: str
    study_id: str
    field: str
    reason: str


@dataclass(slots=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        looked_at: how many things; `unit` says what.
        counts: issues by level, those that are not listed included.
        note: a sentence without any patient's data; empty where there is nothing to say.
    """

    name: str
    unit: str
    looked_at: int = 0
    counts: Counter[Level] = field(default_factory=Counter)
    note: str = ""


@dataclass(slots=True)
class Report:
    """The whole walk.

    Attributes:
        checks: by name, in the order in which they were made.
        splits: split -> what -> count.
        stops: for each reason why training would stop a sentence without any patient's data.
        interrupted: how far the walk came; empty where it came to its end.
    """

    checks: dict[str, Check] = field(default_factory=dict)
    splits: dict[str, Counter[str]] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    interrupted: str = ""
    _issues: list[Issue] = field(default_factory=list)
    _listed: Counter[tuple[str, Level]] = field(default_factory=Counter)

    def open(self, name: str, unit: str) -> Check:
        """Starts a check, or goes on with it."""
        return self.checks.setdefault(name, Check(name=name, unit=unit))

    def add(
        self,
        check: str,
        level: Level,
        reason: str,
        *,
        split: str = "",
        file: str = "",
        study: str = "",
        field: str = "",
    ) -> None:
        """Counts an issue of an open check, and lists it unless that check has listed very many."""
        self.checks[check].counts[level] += 1
        if self._listed[check, level] < MAX_LISTED:
            self._listed[check, level] += 1
            self._issues.append(
                Issue(check=check, level=level, split=split, file=file, study_id=study, field=field, reason=reason)
            )

    def add_problems(self, check: str, problems: Iterable[Problem], split: str) -> None:
        """Counts problems for which the study store would leave something out."""
        for problem in problems:
            self.add(
                check,
                "left out",
                problem.reason,
                split=split,
                file=problem.file,
                study=problem.study_id,
                field=problem.field,
            )

    def stop(self, check: str, said: str, reason: str = "", **where: str) -> None:
        """Adds a reason why training would stop.

        Args:
            said: for the terminal: no id, text or value of a patient.
            reason: for the file; `said` by default.
        """
        self.add(check, "stop", reason or said, **where)
        self.stops.append(said)

    @property
    def issues(self) -> list[Issue]:
        """The listed ones, the gravest first, then in the order of the checks."""
        return sorted(self._issues, key=lambda issue: LEVELS.index(issue.level))

    def write(self, path: Path) -> None:
        """Writes the issues as CSV to `path`, and everything as json beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        issues = self.issues
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([column.name for column in fields(Issue)])
            writer.writerows(astuple(issue) for issue in issues)
            for check in self.checks.values():
                for level in LEVELS:
                    more = check.counts[level] - self._listed[check.name, level]
                    if more > 0:
                        writer.writerow([check.name, level, "", "", "", "", f"{more} more like these are not listed"])
        path.with_suffix(".json").write_text(json.dumps(self._content(), indent=1), encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        return {
            "interrupted": self.interrupted,
            "stops": self.stops,
            "splits": {split: dict(counts) for split, counts in self.splits.items()},
            "checks": [
                {
                    "check": check.name,
                    "looked_at": check.looked_at,
                    "unit": check.unit,
                    "note": check.note,
                    **{level.replace(" ", "_"): check.counts[level] for level in LEVELS},
                }
                for check in self.checks.values()
            ],
            "issues": [{column.name: getattr(issue, column.name) for column in fields(Issue)} for issue in self.issues],
        }
