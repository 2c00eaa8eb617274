"""The whole walk: the model to start from, tables, laboratory values, patients, questions, tokens, then every file.

Owns: the order, what is common to the checks, and when training would stop. Does not own: any single check, or the
terminal. What is cheap comes first, so that an interrupted walk has said the most.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medtvt_rl.config import Config
from medtvt_rl.data.check.labs import check_labs
from medtvt_rl.data.check.questions import PhaseProgress, check_questions, check_tokens
from medtvt_rl.data.check.report import Report
from medtvt_rl.data.check.start_model import check_start_model
from medtvt_rl.data.check.studies import check_files
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.medtvt_qa import plain_path
from medtvt_rl.data.study_build import Tables, mean_percentiles
from medtvt_rl.data.study_rows import StudyRow, read_findings, read_rows
from medtvt_rl.data.validation import check_ids

TABLES, PATIENTS, STUDIES = "tables", "patients and splits", "studies"


def check_data(config: Config, quick: bool = False, progress: PhaseProgress | None = None) -> Report:
    """Walks the data that `config` names; finds everything that can be found, not the first fault alone.

    Args:
        quick: films are opened, not decoded.
        progress: called with (phase, done, total).
    """
    report = Report()
    data = config.data
    check_start_model(report, config)
    report.open(TABLES, "rows")
    if not _folders_are_there(report, config):
        return report
    tables = _read_tables(report, config)
    if not tables.rows:
        if not report.checks[TABLES].counts["stop"]:
            report.stop(TABLES, "no usable row in any table; the file of problems lists why")
        return report
    means = tables.lab_means if tables.lab_means.size else None
    if "train" in data.tables:
        check_labs(report, tables.rows, tables.percentile_table(data), means, data.max_unusable_share)
    usable = {row.study_id: row for row in tables.rows}
    examples = check_questions(report, config, tables, usable, tables.problems)
    check_tokens(report, config, usable, examples, progress)

    def advance(done: int, total: int) -> None:
        if progress:
            progress("studies", done, total)

    file_problems = check_files(report, data, tables.rows, quick, advance)
    _check_share(report, config, tables, file_problems)
    return report


def _folders_are_there(report: Report, config: Config) -> bool:
    data = config.data
    folders = {"data.root": Path(data.root), "data.ecg_folder": data.ecg_root, "data.cxr_folder": data.cxr_root}
    for key, folder in folders.items():
        if not folder.is_dir():
            report.stop(TABLES, f"{key}: {folder} is no folder; mount it, or name another")
    return all(folder.is_dir() for folder in folders.values())


def _read_tables(report: Report, config: Config) -> Tables:
    """The tables as far as they can be read; what cannot be read stops training."""
    data, root = config.data, Path(config.data.root)
    tables = Tables(
        parsed=[], rows=[], num_rows=0, num_left_out=0, problems=[], findings={}, lab_means=np.empty(0, np.float32)
    )
    check = report.checks[TABLES]
    if "train" not in data.tables:
        report.stop(TABLES, f"data.labs_csv: splits are {', '.join(data.tables)}, expected at least train")
    for split in data.tables:
        try:
            found = read_rows(data, split)
        except DataError as error:
            report.stop(TABLES, str(error), split=split, file=data.tables[split])
            continue
        tables.parsed += found.rows
        tables.problems += found.problems
        tables.num_left_out += found.num_left_out
        report.add_problems(TABLES, found.problems, split)
    tables.num_rows = len(tables.parsed) + len(tables.problems)
    check.looked_at = tables.num_rows
    if tables.num_left_out:
        check.note = f"{tables.num_left_out} more rows are left out by data.only_rows"
    tables.rows, refused = check_ids(tables.parsed, data.splits)
    tables.problems += refused
    _check_patients(report, tables, refused)
    _read_further_tables(report, config, tables, root)
    for row in tables.rows:
        counts = report.splits.setdefault(row.split, Counter())
        counts["studies"] += 1
        counts["with laboratory values"] += bool(row.labs.measured.any())
        counts["laboratory values"] += int(row.labs.measured.sum())
        counts["rows without an ECG"] += not row.ecg_path
        counts["rows without a film"] += not row.cxr_path
        counts["rows without laboratory values"] += not row.labs.measured.any()
    for split in data.splits:
        report.splits.setdefault(split, Counter())["patients"] = len(
            {row.patient_id for row in tables.rows if row.split == split}
        )
    return tables


def _read_further_tables(report: Report, config: Config, tables: Tables, root: Path) -> None:
    data = config.data
    try:
        if data.labs_means is not None or "train" in data.tables:
            tables.lab_means = mean_percentiles(data, tables)
    except DataError as error:
        said = (
            f"{data.labs_means}: missing, or not the means of the 50 items; mend data.labs_means, or set it null "
            "to take those of the training table"
        )
        report.stop(TABLES, said, str(error), file=str(data.labs_means))
    if data.findings_csv is not None:
        try:
            tables.findings, refused = read_findings(root, data.findings_csv)
        except DataError as error:
            report.stop(TABLES, str(error), file=data.findings_csv)
            return
        tables.problems += refused
        report.add_problems(TABLES, refused, "")


def _check_patients(report: Report, tables: Tables, refused: Sequence[Problem]) -> None:
    """Patients and studies in two splits, and files that two splits share."""
    check = report.open(PATIENTS, "patients")
    check.looked_at = len({row.patient_id for row in tables.parsed})
    splits = {row.location: row.split for row in tables.parsed}
    for problem in refused:
        report.add_problems(PATIENTS, [problem], splits[problem.file])
    by_path: dict[str, list[StudyRow]] = defaultdict(list)
    for row in tables.rows:
        for path in (row.ecg_path, row.cxr_path):
            if path:
                by_path[plain_path(path)].append(row)
    for rows in by_path.values():
        others = {row.split for row in rows}
        if len(others) > 1:
            for row in rows:
                reason = f"its ECG or film is also that of a study in another split ({', '.join(sorted(others))})"
                report.add(PATIENTS, "look", reason, split=row.split, file=row.location, study=row.study_id)
    leaking = sum(problem.field in ("subject_id", "study_id") for problem in refused)
    if leaking:
        check.note = f"{leaking} rows are left out, so that no patient or study is in two splits or stands twice"


def _check_share(report: Report, config: Config, tables: Tables, file_problems: Sequence[Problem]) -> None:
    """Whether the store would refuse to be built; after an interruption this speaks of the studies seen."""
    check = report.open(STUDIES, "studies")
    check.looked_at = tables.num_rows
    bad = tables.num_rows - len(tables.rows) + len({problem.file for problem in file_problems})
    check.note = f"{tables.num_rows - bad} usable"
    share = config.data.max_unusable_share
    if bad > share * tables.num_rows:
        report.stop(
            STUDIES, f"{bad} of {tables.num_rows} studies are unusable, more than data.max_unusable_share={share:g}"
        )
