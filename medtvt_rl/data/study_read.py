"""Reads the ECG and the film of one study; runs in pool processes, so it imports little.

Owns: that both files lie inside their folders, and the bytes that the store keeps. Does not own: the formats (ecg.py,
cxr.py) or what becomes of a study whose files cannot be read (study_build.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtvt_rl.data.config import FilmConfig
from medtvt_rl.data.cxr import read_film
from medtvt_rl.data.ecg import read_ecg
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.paths import inside_root
from medtvt_rl.data.raw_ecg import ecg_files
from medtvt_rl.data.study_rows import StudyRow


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTask:
    """One study to read; its paths count from `ecg_root` and `cxr_root`."""

    ecg_root: Path
    cxr_root: Path
    row: StudyRow
    film: FilmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFiles:
    """What was read.

    Attributes:
        ecg: the bytes of [12, 1000] float16, mV at 100 Hz; None if not taken.
        film: the bytes of [S, S] uint8; None if not taken.
        problems: what is wrong with either; empty if the study is usable.
    """

    ecg: bytes | None
    film: bytes | None
    problems: tuple[Problem, ...]


def read_study_files(task: ReadTask) -> ReadFiles:
    """Reads one study's ECG and film; whatever is wrong with either is in `problems`."""
    row, problems = task.row, []
    ecg = film = None
    if row.ecg_path:
        try:
            for path in ecg_files(Path(row.ecg_path)):
                inside_root(task.ecg_root, str(path), "ecg_path")
            ecg = read_ecg(inside_root(task.ecg_root, row.ecg_path, "ecg_path")).astype(np.float16).tobytes()
        except DataError as error:
            problems.append(row.problem("ecg_path", relative(error, task.ecg_root)))
    if row.cxr_path:
        try:
            film = read_film(inside_root(task.cxr_root, row.cxr_path, "cxr_path"), task.film).tobytes()
        except DataError as error:
            problems.append(row.problem("cxr_path", relative(error, task.cxr_root)))
    if not row.ecg_path and not row.cxr_path and np.isnan(row.labs.values).all():
        problems.append(row.problem("study_id", "the study has no ECG, no film and no laboratory value; drop the row"))
    return ReadFiles(ecg=ecg, film=film, problems=tuple(problems))


def relative(error: DataError, root: Path) -> str:
    """The error's message, with paths that count from `root`."""
    return str(error).replace(f"{os.path.realpath(root)}{os.sep}", "")
