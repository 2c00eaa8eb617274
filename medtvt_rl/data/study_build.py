"""Builds the study store: reads every table and file of a data root, validates, and writes Arrow files in one step.

Owns: what makes a store up to date (its fingerprint), the order of the checks, and the atomic swap. Does not own: the
checks themselves (study_rows.py, validation.py, ecg.py, cxr.py, medtvt_qa.py) or reading a store (study_store.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.labs import PercentileTable, read_labs_means
from medtvt_rl.data.medtvt_qa import QA_KINDS, REFUSED, QAExample, QAKind, StudyIndex, read_qa
from medtvt_rl.data.parallel import Progress, ordered_map
from medtvt_rl.data.paths import inside_root
from medtvt_rl.data.raw_ecg import ecg_files
from medtvt_rl.data.study_files import StoredStudy, write_studies
from medtvt_rl.data.study_read import ReadTask, read_study_files
from medtvt_rl.data.study_rows import StudyRow, read_findings, read_rows
from medtvt_rl.data.validation import check_ids, write_problems

FORMAT_VERSION = 1
META, STUDIES, QUESTIONS, PROBLEMS, PERCENTILES = (
    "meta.json",
    "studies.arrow",
    "qa.arrow",
    "problems.csv",
    "percentiles.json",
)


@dataclass(slots=True)
class _Tables:
    """What the tables of a data root hold, before any ECG or film is opened.

    Attributes:
        rows: rows that passed the checks of tables and ids.
        num_rows: rows in all, the refused ones included.
        findings: study id -> [20] bool; empty where there is no such table.
    """

    rows: list[StudyRow]
    num_rows: int
    problems: list[Problem]
    findings: dict[str, NDArray[np.bool_]]
    lab_means: NDArray[np.float32]


def store_folder(config: DataConfig) -> Path:
    """The folder of the store; the default follows data.root even where no YAML loader resolved it."""
    return Path(config.store.replace("${.root}", config.root))


def build_store(config: DataConfig, progress: Progress | None = None) -> Path:
    """Writes the store unless an up-to-date one lies there; returns its folder.

    Args:
        progress: called with (studies read, studies in all).

    Raises:
        DataError: a table is missing or malformed, more than config.max_unusable_share of studies or of question-answer
            entries are unusable (the list is written beside the store), or the folder holds something else.
    """
    root, store = Path(config.root), store_folder(config)
    if not root.is_dir():
        raise DataError(f"data.root: {root} is no folder; write a cohort there, or point it at the data")
    _check_place(store)
    tables = _read_tables(config, root)
    fingerprint = _fingerprint(config, root, tables)
    if _stored_fingerprint(store) == fingerprint:
        return store
    partial = store.parent / f".{store.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_store(config, root, tables, partial, fingerprint, progress)
        _swap_in(partial, store, fingerprint)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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


def _read_tables(config: DataConfig, root: Path) -> _Tables:
    if "train" not in config.labs_csv:
        raise DataError(f"data.labs_csv: splits are {list(config.labs_csv)}, expected at least train")
    rows: list[StudyRow] = []
    problems: list[Problem] = []
    num_rows = 0
    for split, file in config.labs_csv.items():
        found, refused = read_rows(root, file, split)
        rows += found
        problems += refused
        num_rows += len(found) + len(refused)
    if not rows:
        raise DataError(
            f"data.labs_csv: no usable row in {list(config.labs_csv.values())}; {_listed(config, problems)}"
        )
    kept, refused = check_ids(rows, list(config.labs_csv))
    problems += refused
    findings: dict[str, NDArray[np.bool_]] = {}
    if config.findings_csv is not None:
        findings, refused = read_findings(root, config.findings_csv)
        problems += refused
    means = read_labs_means(inside_root(root, config.labs_means, "data.labs_means"))
    return _Tables(rows=kept, num_rows=num_rows, problems=problems, findings=findings, lab_means=means)


def _qa_files(config: DataConfig, root: Path) -> list[tuple[str, QAKind, str]]:
    """(split, kind, file) of each question-answer file. Explanations of held-out splits may be absent."""
    files = []
    for split in config.labs_csv:
        for kind in QA_KINDS:
            file = config.qa.format(kind=kind, split=split)
            if kind == "diagnosis" or split == "train" or inside_root(root, file, "data.qa").is_file():
                files.append((split, kind, file))
    return files


def _fingerprint(config: DataConfig, root: Path, tables: _Tables) -> str:
    """Changes with any table's content, any record's size or time, and any setting that shapes the store."""
    settings = dataclasses.asdict(config)
    for key in ("root", "store", "num_workers"):
        del settings[key]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings], sort_keys=True).encode())
    names = [*config.labs_csv.values(), config.labs_means, *(file for _, _, file in _qa_files(config, root))]
    for name in [*names, *([config.findings_csv] if config.findings_csv else [])]:
        path = root / name
        digest.update(f"{name}\0{path.stat().st_size if path.exists() else None}\0".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    for row in tables.rows:
        files = ecg_files(root / row.ecg_path) if row.ecg_path else []
        for path in [*files, *([root / row.cxr_path] if row.cxr_path else [])]:
            try:
                stat = path.stat()
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            except (OSError, ValueError):
                digest.update(f"{path.name}\0missing\0".encode())
    return digest.hexdigest()


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
    config: DataConfig, root: Path, tables: _Tables, folder: Path, fingerprint: str, progress: Progress | None
) -> None:
    """Writes studies while they are read, then questions about the usable ones, problems, and what `open` needs."""
    table = PercentileTable.fit(
        np.array([row.labs.values for row in tables.rows if row.split == "train"]).reshape(-1, 50)
    )
    table.save(folder / PERCENTILES)
    problems, usable = list(tables.problems), dict[str, StudyRow]()
    studies = _usable_studies(config, root, tables, table, problems, usable, progress)
    write_studies(folder / STUDIES, studies, config.film.size)
    examples, qa_problems, num_entries = _read_questions(config, root, list(usable.values()), problems)
    num_unusable = tables.num_rows - len(usable)
    num_bad_entries = sum(REFUSED not in problem.reason for problem in qa_problems)
    _check_shares(config, problems + qa_problems, (num_unusable, tables.num_rows), (num_bad_entries, num_entries))
    _write_questions(folder / QUESTIONS, examples, {study_id: row.split for study_id, row in usable.items()})
    write_problems(folder / PROBLEMS, problems + qa_problems)
    meta = {
        "fingerprint": fingerprint,
        "format_version": FORMAT_VERSION,
        "film_size": config.film.size,
        "splits": list(config.labs_csv),
        "num_studies": len(usable),
        "num_unusable_studies": num_unusable,
        "num_unusable_entries": len(qa_problems),
        "lab_mean_percentiles": tables.lab_means.tolist(),
    }
    (folder / META).write_text(json.dumps(meta, indent=1))


def _usable_studies(
    config: DataConfig,
    root: Path,
    tables: _Tables,
    table: PercentileTable,
    problems: list[Problem],
    usable: dict[str, StudyRow],
    progress: Progress | None,
) -> Iterator[StoredStudy]:
    """Yields studies whose files can be read and adds them to `usable`; the faults of the rest go to `problems`."""
    tasks = [ReadTask(root=root, row=row, film=config.film) for row in tables.rows]
    for row, files in zip(tables.rows, ordered_map(read_study_files, tasks, config.num_workers, progress)):
        problems += files.problems
        if files.problems:
            continue
        usable[row.study_id] = row
        percentiles = row.labs.percentiles
        yield StoredStudy(
            study_id=row.study_id,
            patient_id=row.patient_id,
            split=row.split,
            ecg=files.ecg,
            film=files.film,
            percentiles=table.percentiles(row.labs.values) if percentiles is None else percentiles,
            findings=tables.findings.get(row.study_id),
        )


def _read_questions(
    config: DataConfig, root: Path, rows: list[StudyRow], study_problems: list[Problem]
) -> tuple[list[QAExample], list[Problem], int]:
    """Examples, problems, and how many entries there were."""
    usable = {row.study_id for row in rows}
    refused = {p.study_id: p.reason for p in study_problems if p.study_id and p.study_id not in usable}
    examples: list[QAExample] = []
    problems: list[Problem] = []
    for split in config.labs_csv:
        index = StudyIndex(row for row in rows if row.split == split)
        for _, kind, file in (entry for entry in _qa_files(config, root) if entry[0] == split):
            found, bad = read_qa(root, file, kind, index, refused)
            examples += found
            problems += bad
    return examples, problems, len(examples) + len(problems)


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
