"""Builds the study store: reads every table and file of a data root, validates, and writes Arrow files.

Owns: what makes a store up to date (its fingerprint), the order of the checks, and the atomic swap. Does not own: the
checks themselves (study_rows.py, validation.py, ecg.py, cxr.py, medtvt_qa.py), going on after an interruption
(study_parts.py), or reading a store (study_store.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.labs import NUM_LABS, PercentileTable, read_labs_means
from medtvt_rl.data.medtvt_qa import QA_KINDS, REFUSED, QAExample, QAKind, StudyIndex, read_qa
from medtvt_rl.data.parallel import Progress
from medtvt_rl.data.paths import inside_root
from medtvt_rl.data.raw_ecg import ecg_files
from medtvt_rl.data.study_files import join_studies
from medtvt_rl.data.study_parts import StudyParts, building_folder
from medtvt_rl.data.study_rows import StudyRow, read_findings, read_rows
from medtvt_rl.data.validation import check_ids, write_problems

FORMAT_VERSION = 2
META, STUDIES, QUESTIONS, PROBLEMS, PERCENTILES = (
    "meta.json",
    "studies.arrow",
    "qa.arrow",
    "problems.csv",
    "percentiles.json",
)


@dataclass(slots=True)
class Tables:
    """What the tables of a data root hold, before any ECG or film is opened.

    Attributes:
        parsed: every row that could be read, in the order of splits and lines.
        rows: of these the ones that passed the checks of ids.
        num_rows: rows in all, the refused ones included.
        num_left_out: rows that data.only_rows does not take.
        findings: study id -> [20] bool; empty where there is no such table.
    """

    parsed: list[StudyRow]
    rows: list[StudyRow]
    num_rows: int
    num_left_out: int
    problems: list[Problem]
    findings: dict[str, NDArray[np.bool_]]
    lab_means: NDArray[np.float32]

    def percentile_table(self, config: DataConfig) -> PercentileTable:
        """Of the training table's values, those of its validation patients included, as its own columns are."""
        train = config.tables["train"]
        values = [row.labs.values for row in self.rows if row.file == train]
        return PercentileTable.fit(np.array(values).reshape(-1, NUM_LABS))


def store_folder(config: DataConfig) -> Path:
    """The folder of the store; the default follows data.root even where no YAML loader resolved it."""
    return Path(config.store.replace("${.root}", config.root))


def build_store(config: DataConfig, progress: Progress | None = None) -> Path:
    """Writes the store unless an up-to-date one lies there; returns its folder.

    A build that was interrupted goes on with the studies that it had not read yet.

    Args:
        progress: called with (studies read, studies in all).

    Raises:
        DataError: a table is missing or malformed, more than config.max_unusable_share of studies or of question-answer
            entries are unusable (the list is written beside the store), or the folder holds something else.
    """
    store = store_folder(config)
    _check_place(store)
    tables = read_tables(config)
    for _, kind, file in qa_files(config):
        if not inside_root(Path(config.root), file, "data.qa").is_file():
            raise DataError(f"data.qa: {file}: no such file; put the {kind} questions there, or mend data.qa_files")
    studies_print, fingerprint = _fingerprints(config, tables)
    if _stored_fingerprint(store) == fingerprint:
        return store
    store.parent.mkdir(parents=True, exist_ok=True)
    with building_folder(store) as folder:
        parts = StudyParts(folder / "parts", studies_print)
        new = folder / "store"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write_store(config, tables, parts, new, fingerprint, progress)
        _swap_in(new, store, fingerprint)
        shutil.rmtree(folder, ignore_errors=True)
    return store


def _check_place(store: Path) -> None:
    if store.exists() and not (store / META).is_file() and (not store.is_dir() or any(store.iterdir())):
        raise DataError(f"data.store: {store} holds something that is no study store; choose another folder")


def _stored_fingerprint(store: Path) -> str | None:
    try:
        content = json.loads((store / META).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return str(content.get("fingerprint"))


def _swap_in(partial: Path, store: Path, fingerprint: str) -> None:
    """Puts the new store in the place of the old. Another process that built the same one meanwhile may have won."""
    old = store.parent / f".{store.name}.old-{os.getpid()}"
    try:
        if store.exists():
            store.rename(old)
        partial.rename(store)
    except OSError:
        if _stored_fingerprint(store) != fingerprint:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def read_tables(config: DataConfig) -> Tables:
    """Every table of the data root. Raises DataError for one that is missing or malformed, or if no row is usable."""
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root: {root} is no folder; write a cohort there, or point it at the data")
    for key, folder in (("ecg_folder", config.ecg_root), ("cxr_folder", config.cxr_root)):
        if not folder.is_dir():
            raise DataError(f"data.{key}: {folder} is no folder; name the one that the paths in the tables count from")
    if "train" not in config.tables:
        raise DataError(f"data.labs_csv: splits are {list(config.tables)}, expected at least train")
    parsed: list[StudyRow] = []
    problems: list[Problem] = []
    num_left_out = 0
    for split in config.tables:
        table = read_rows(config, split)
        parsed += table.rows
        problems += table.problems
        num_left_out += table.num_left_out
    if not parsed:
        raise DataError(f"data.labs_csv: no usable row in {list(config.tables.values())}; {_listed(config, problems)}")
    num_rows = len(parsed) + len(problems)
    kept, refused = check_ids(parsed, config.splits)
    problems += refused
    findings: dict[str, NDArray[np.bool_]] = {}
    if config.findings_csv is not None:
        findings, refused = read_findings(root, config.findings_csv)
        problems += refused
    means = read_labs_means(inside_root(root, config.labs_means, "data.labs_means"))
    return Tables(
        parsed=parsed,
        rows=kept,
        num_rows=num_rows,
        num_left_out=num_left_out,
        problems=problems,
        findings=findings,
        lab_means=means,
    )


def qa_files(config: DataConfig) -> list[tuple[str, QAKind, str]]:
    """(split of its table, kind, file) of each question-answer file. Explanations of held-out splits may be absent, and
    so may all questions of a validation table."""
    files = []
    for split in config.tables:
        for kind in QA_KINDS:
            file = config.qa_files.get(f"{kind}_{split}", config.qa.format(kind=kind, split=split))
            needed = kind == "diagnosis" or split == "train"
            if needed or inside_root(Path(config.root), file, "data.qa").is_file():
                files.append((split, kind, file))
    return files


def _fingerprints(config: DataConfig, tables: Tables) -> tuple[str, str]:
    """One that changes with whatever shapes the studies (tables, records' sizes and times, settings), and one that also
    changes with questions and the rest."""
    root, settings = Path(config.root), dataclasses.asdict(config)
    for key in ("root", "store", "num_workers", "ecg_folder", "cxr_folder"):
        del settings[key]
    later = {key: settings.pop(key) for key in ("qa", "qa_files", "labs_means", "max_unusable_share")}
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings], sort_keys=True).encode())
    findings = [config.findings_csv] if config.findings_csv else []
    for name in [*config.tables.values(), *findings]:
        _add_file(digest, root, name)
    for row in tables.rows:
        files = ecg_files(config.ecg_root / row.ecg_path) if row.ecg_path else []
        for path in [*files, *([config.cxr_root / row.cxr_path] if row.cxr_path else [])]:
            try:
                stat = path.stat()
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            except (OSError, ValueError):
                digest.update(f"{path.name}\0missing\0".encode())
    studies = digest.hexdigest()
    digest.update(json.dumps(later, sort_keys=True).encode())
    for name in [config.labs_means, *(file for _, _, file in qa_files(config))]:
        _add_file(digest, root, name)
    return studies, digest.hexdigest()


def _add_file(digest: Any, root: Path, name: str) -> None:
    path = root / name
    digest.update(f"{name}\0{path.stat().st_size if path.exists() else None}\0".encode())
    if path.is_file():
        digest.update(path.read_bytes())


def _listed(config: DataConfig, problems: Sequence[Problem]) -> str:
    """Writes the problems beside the store, and says where; their reasons may hold values of patients."""
    if not problems:
        return "the tables are empty"
    store = store_folder(config)
    path = store.parent / f"{store.name}.problems.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_problems(path, problems)
    return f"{path} has the reasons, the first is at {problems[0].place}"


def _write_store(
    config: DataConfig, tables: Tables, parts: StudyParts, folder: Path, fingerprint: str, progress: Progress | None
) -> None:
    """Writes studies, then questions about the usable ones, problems, and what `open` needs."""
    table = tables.percentile_table(config)
    table.save(folder / PERCENTILES)
    file_problems = parts.fill(config, tables.rows, table, tables.findings, progress)
    problems = tables.problems + file_problems
    bad = {problem.file for problem in file_problems}
    usable = {row.study_id: row for row in tables.rows if row.location not in bad}
    examples, qa_problems, num_entries = read_questions(config, tables, usable, problems)
    num_unusable = tables.num_rows - len(usable)
    num_bad_entries = sum(REFUSED not in problem.reason for problem in qa_problems)
    _check_shares(config, problems + qa_problems, (num_unusable, tables.num_rows), (num_bad_entries, num_entries))
    join_studies(folder / STUDIES, parts.files, config.film.size)
    _write_questions(folder / QUESTIONS, examples, {study_id: row.split for study_id, row in usable.items()})
    write_problems(folder / PROBLEMS, problems + qa_problems)
    meta = {
        "fingerprint": fingerprint,
        "format_version": FORMAT_VERSION,
        "film_size": config.film.size,
        "splits": list(config.splits),
        "num_studies": len(usable),
        "num_unusable_studies": num_unusable,
        "num_unusable_entries": len(qa_problems),
        "lab_mean_percentiles": tables.lab_means.tolist(),
    }
    (folder / META).write_text(json.dumps(meta, indent=1))


def read_questions(
    config: DataConfig, tables: Tables, usable: Mapping[str, StudyRow], study_problems: Sequence[Problem]
) -> tuple[list[QAExample], list[Problem], int]:
    """Examples, problems, and how many entries there were.

    Args:
        usable: study id -> row of the studies that questions may be about.
        study_problems: what is wrong with the others.
    """
    examples: list[QAExample] = []
    problems: list[Problem] = []
    for split, kind, file in qa_files(config):
        index, unread = question_index(config, tables, split, usable, study_problems)
        found, bad = read_qa(Path(config.root), file, kind, index, unread)
        examples += found
        problems += bad
    return examples, problems, len(examples) + len(problems)


def question_index(
    config: DataConfig,
    tables: Tables,
    split: str,
    usable: Mapping[str, StudyRow],
    study_problems: Sequence[Problem],
) -> tuple[StudyIndex, dict[str, str]]:
    """What questions of a split's files may speak of, and the ids of studies whose rows could not be read, with why."""
    reasons = {problem.file: problem.reason for problem in study_problems}
    rows = [row for row in tables.parsed if row.file == config.tables[split]]
    refused = {row.location: reasons.get(row.location, "") for row in rows if usable.get(row.study_id) is not row}
    known = {row.study_id for row in rows} | usable.keys()
    unread = {p.study_id: p.reason for p in study_problems if p.study_id and p.study_id not in known}
    return StudyIndex(rows, refused), unread


def _check_shares(
    config: DataConfig, problems: list[Problem], studies: tuple[int, int], entries: tuple[int, int]
) -> None:
    """Raises DataError, after writing the list beside the store, if too much is unusable."""
    for noun, (bad, total) in (("studies", studies), ("question-answer entries", entries)):
        if bad > config.max_unusable_share * total:
            raise DataError(
                f"{bad} of {total} {noun} are unusable, more than "
                f"data.max_unusable_share={config.max_unusable_share:g}; {_listed(config, problems)}"
            )


def _write_questions(path: Path, examples: list[QAExample], splits: dict[str, str]) -> None:
    columns: dict[str, list[str]] = {"split": [splits[example.study_id] for example in examples]}
    for name in ("study_id", "kind", "question", "answer"):
        columns[name] = [getattr(example, name) for example in examples]
    table = pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
