"""Opens the ECG and the film of every study, as the store's build would, and looks at them more closely.

Owns: the walk over files, on all cores. Does not own: what makes a file unusable (data/study_read.py), or what is odd
in an ECG (ecg_signal.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from medtvt_rl.data.check import ecg_signal
from medtvt_rl.data.check.report import Report
from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.cxr import FORMATS, is_dicom
from medtvt_rl.data.ecg import standard_ecg
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.parallel import ordered_map
from medtvt_rl.data.paths import inside_root
from medtvt_rl.data.raw_ecg import read_raw_ecg
from medtvt_rl.data.silence import silent_readers
from medtvt_rl.data.study_read import ReadTask, read_study_files, relative
from medtvt_rl.data.study_rows import StudyRow

ECGS, FILMS = "ECG signals", "films"
# What makes an ECG wrong, where other notes only make it unusual.
WRONG = (ecg_signal.AMPLITUDE, ecg_signal.LIMBS)
_PATIENT = re.compile(r"(?:^|/)p(\d{6,})/")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckTask:
    """One study to look at. `quick`: the film is opened, not decoded."""

    read: ReadTask
    quick: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedStudy:
    """What was found.

    Attributes:
        problems: for which the store would leave the study out.
        ecg_notes: kind -> sentence.
        film_note: empty where there is nothing to say.
    """

    problems: tuple[Problem, ...]
    ecg_notes: dict[str, str]
    film_note: str


def check_study(task: CheckTask) -> CheckedStudy:
    """Looks at one study; runs in pool processes."""
    read, row = task.read, task.read.row
    problems: list[Problem] = []
    film_note = ""
    if task.quick and row.cxr_path:
        try:
            film_note = _film_note(read)
        except DataError as error:
            problems.append(row.problem("cxr_path", str(error)))
        found = read_study_files(replace(read, row=replace(row, cxr_path="")))
        problems += [problem for problem in found.problems if problem.field != "study_id"]
    else:
        problems += read_study_files(read).problems
        if row.cxr_path and not problems:
            film_note = _film_note(read)
    notes: dict[str, str] = {}
    if row.ecg_path and not any(problem.field == "ecg_path" for problem in problems):
        raw = read_raw_ecg(inside_root(read.ecg_root, row.ecg_path, "ecg_path"))
        notes = ecg_signal.raw_notes(raw) | ecg_signal.signal_notes(standard_ecg(raw))
    return CheckedStudy(problems=tuple(problems), ecg_notes=notes, film_note=film_note)


def _film_note(read: ReadTask) -> str:
    """What is odd about a film's size. Raises DataError for one that cannot be opened."""
    path = inside_root(read.cxr_root, read.row.cxr_path, "cxr_path")
    if not path.is_file():
        raise DataError(relative(DataError(f"{path}: no such file; check the film path"), read.cxr_root))
    if is_dicom(path):
        return ""
    try:
        with silent_readers(), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{read.row.cxr_path}: not a readable film ({type(error).__name__}); copy it again") from error
    if min(width, height) < read.film.size:
        return f"the film has {width} x {height} pixels, fewer than data.film.size={read.film.size}"
    return ""


def check_files(
    report: Report,
    config: DataConfig,
    rows: Sequence[StudyRow],
    quick: bool,
    progress: Callable[[int, int], None],
) -> list[Problem]:
    """Looks at all studies; returns the problems that leave some out. An interruption ends it early, and is noted."""
    ecgs, films = report.open(ECGS, "ECGs"), report.open(FILMS, "films")
    if quick:
        films.note = "opened, not decoded (--quick)"
    problems: list[Problem] = []
    wrong: Counter[str] = Counter()
    tasks = [
        CheckTask(
            read=ReadTask(ecg_root=config.ecg_root, cxr_root=config.cxr_root, row=row, film=config.film), quick=quick
        )
        for row in rows
    ]
    done = 0
    try:
        for row, found in zip(rows, ordered_map(check_study, tasks, config.num_workers, progress)):
            done += 1
            _add_study(report, row, found, wrong)
            problems += found.problems
            ecgs.looked_at += bool(row.ecg_path)
            films.looked_at += bool(row.cxr_path)
    except KeyboardInterrupt:
        report.interrupted = f"after {done} of {len(rows)} studies"
    for kind, number in wrong.items():
        if number > config.max_unusable_share * ecgs.looked_at:
            report.stop(
                ECGS,
                f"{number} of {ecgs.looked_at} ECGs are wrong in {kind}: training would learn from wrong signals; mend "
                "the headers",
            )
    return problems


def _add_study(report: Report, row: StudyRow, found: CheckedStudy, wrong: Counter[str]) -> None:
    counts = report.splits.setdefault(row.split, Counter())
    bad = {problem.field for problem in found.problems}
    counts["ECGs"] += bool(row.ecg_path) and "ecg_path" not in bad
    counts["films"] += bool(row.cxr_path) and "cxr_path" not in bad
    counts["studies with unusable files"] += bool(bad)
    for problem in found.problems:
        report.add_problems(FILMS if problem.field == "cxr_path" else ECGS, [problem], row.split)
    where = {"split": row.split, "file": row.location, "study": row.study_id}
    for kind, sentence in found.ecg_notes.items():
        wrong[kind] += kind in WRONG
        report.add(ECGS, "look", f"{kind}: {sentence}", **where, field="ecg_path")
    if found.film_note:
        report.add(FILMS, "look", found.film_note, **where, field="cxr_path")
    for field, path in (("ecg_path", row.ecg_path), ("cxr_path", row.cxr_path)):
        match = _PATIENT.search(path)
        if match and match[1] != row.patient_id:
            check = ECGS if field == "ecg_path" else FILMS
            report.add(check, "look", "the path names another patient than subject_id", **where, field=field)
