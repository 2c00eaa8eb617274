"""The studies of a store while it is built, in parts that survive an interruption.

Owns: the folder of a build and who may work in it, the parts, and which of them are finished. Does not own: reading a
study (study_read.py), or what else a store holds (study_build.py). A part is a fixed run of the tables' rows, so a
build that was cut short leaves the same store behind as one that was not.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.errors import Problem
from medtvt_rl.data.labs import PercentileTable
from medtvt_rl.data.parallel import Progress, ordered_map
from medtvt_rl.data.study_files import StoredStudy, write_studies
from medtvt_rl.data.study_read import ReadFiles, ReadTask, read_study_files
from medtvt_rl.data.study_rows import StudyRow

ROWS_PER_PART = 256
_FINGERPRINT = "fingerprint"


@contextmanager
def building_folder(store: Path) -> Iterator[Path]:
    """The hidden folder beside the store in which it is built; what an interrupted build left there is kept.

    Whoever finds another process at work there builds in a folder of its own, which is not kept.
    """
    folder = store.parent / f".{store.name}.building"
    descriptor = _lock(folder)
    if descriptor is None:
        folder = folder.with_name(f"{folder.name}-{os.getpid()}")
        folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if descriptor is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder, or None if another process does, or the file system has no locks."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(folder).st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


class StudyParts:
    """Parts of a store under construction.

    Args:
        fingerprint: of everything that shapes the studies; parts of another are dropped.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self.files: list[Path] = []
        mark = folder / _FINGERPRINT
        if not mark.is_file() or mark.read_text() != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(fingerprint)

    def fill(
        self,
        config: DataConfig,
        rows: Sequence[StudyRow],
        table: PercentileTable,
        findings: Mapping[str, NDArray[np.bool_]],
        progress: Progress | None,
    ) -> list[Problem]:
        """Reads the studies that no finished part holds; returns what is wrong with unusable ones, in order.

        Args:
            table: turns values into percentiles where the rows have none.
            findings: study id -> [20] bool.
            progress: called with (studies read, studies in all), those of finished parts included.
        """
        runs = [rows[start : start + ROWS_PER_PART] for start in range(0, len(rows), ROWS_PER_PART)]
        self.files = [self._folder / f"{number:05d}.arrow" for number in range(len(runs))]
        left = [number for number, file in enumerate(self.files) if not _is_whole(file)]
        tasks = [
            ReadTask(ecg_root=config.ecg_root, cxr_root=config.cxr_root, row=row, film=config.film)
            for number in left
            for row in runs[number]
        ]
        before = len(rows) - len(tasks)

        def advance(done: int, _: int) -> None:
            if progress:
                progress(before + done, len(rows))

        results = ordered_map(read_study_files, tasks, config.num_workers, advance)
        for number in left:
            self._write(number, runs[number], islice(results, len(runs[number])), config.film.size, table, findings)
        return [Problem(**entry) for file in self.files for entry in json.loads(file.with_suffix(".json").read_text())]

    def _write(
        self,
        number: int,
        rows: Sequence[StudyRow],
        results: Iterator[ReadFiles],
        film_size: int,
        table: PercentileTable,
        findings: Mapping[str, NDArray[np.bool_]],
    ) -> None:
        """One part and its problems; the part appears last, and whole."""
        problems: list[Problem] = []

        def studies() -> Iterator[StoredStudy]:
            for row, read in zip(rows, results):
                problems.extend(read.problems)
                if not read.problems:
                    yield _stored(row, read, table, findings)

        file = self.files[number]
        writing = file.with_suffix(".writing")
        write_studies(writing, studies(), film_size)
        file.with_suffix(".json").write_text(json.dumps([asdict(problem) for problem in problems]))
        os.replace(writing, file)


def _stored(
    row: StudyRow, read: ReadFiles, table: PercentileTable, findings: Mapping[str, NDArray[np.bool_]]
) -> StoredStudy:
    percentiles = row.labs.percentiles
    return StoredStudy(
        study_id=row.study_id,
        patient_id=row.patient_id,
        split=row.split,
        ecg=read.ecg,
        film=read.film,
        percentiles=table.percentiles(row.labs.values) if percentiles is None else percentiles,
        findings=findings.get(row.study_id),
    )


def _is_whole(file: Path) -> bool:
    """Whether a part was finished; one that a power cut spoilt is not."""
    try:
        with pa.memory_map(str(file), "r") as source:
            pa.ipc.open_file(source)
        json.loads(file.with_suffix(".json").read_text())
    except (OSError, pa.ArrowInvalid, json.JSONDecodeError):
        return False
    return True
