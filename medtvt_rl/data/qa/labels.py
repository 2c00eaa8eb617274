"""The structured labels of each study, from the tables of MIMIC-IV-ECG, MIMIC-CXR-JPG and MIMIC-IV.

Owns: which row of which table belongs to a study, the cleaning of machine statements, the values of CXR labels, and the
counts of what could not be used. Does not own: diseases (icd.py), reference ranges, or what is asked (templates.py).

Joins are by id and checked by the patient: the ECG by its study id (column ecg_study_id, else the name of its record),
the film by its study id (column cxr_study_id, else the sNNN folder of its path), the stay by the column hadm_id.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.medtvt_qa import QAKind, plain_path
from medtvt_rl.data.qa.icd import PAPER_RULES, IcdRules, diseases_of_stay
from medtvt_rl.data.qa.reference_ranges import LabReading, read_ranges, readings
from medtvt_rl.data.qa.tables import rows_of
from medtvt_rl.data.study_rows import StudyRow, plain_id, read_rows
from medtvt_rl.data.validation import check_ids

NO_FINDING = "No Finding"
CXR_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    NO_FINDING,
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
PRESENT, ABSENT, UNCERTAIN = "present", "absent", "uncertain"
_CXR_VALUES = {"1": PRESENT, "0": ABSENT, "-1": UNCERTAIN}
_TECHNICAL = re.compile(
    r"age and gender specific|analysis|data quality|poor quality|artifact|unsuitable|not (?:available|valid)|warning|"
    r"summary|lead\(?s\)? (?:missing|off|reversal)|reversal|unconfirmed|compared (?:with|to)|previous|no change",
    re.IGNORECASE,
)
_REPORTS = r"report_\d+"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSources:
    """The tables. One that no chosen kind of question needs may be None.

    Attributes:
        ecg: machine_measurements.csv of MIMIC-IV-ECG.
        cxr: mimic-cxr-2.0.0-chexpert.csv (or -negbio) of MIMIC-CXR-JPG.
        icd: diagnoses_icd.csv of MIMIC-IV. Each of the three may end in .gz.
        lab_ranges: reference ranges of one's own; None takes typical ones.
        icd_rules: which codes count for which disease.
    """

    ecg: Path | None
    cxr: Path | None
    icd: Path | None
    lab_ranges: Path | None = None
    icd_rules: IcdRules = PAPER_RULES


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLabels:
    """What the tables say of one study.

    Attributes:
        ecg_path, cxr_path: relative to the data root; empty if not taken.
        statements: the machine's, cleaned, in their order.
        film: label -> "present", "absent" or "uncertain"; labels without a value are left out.
        labs: the measured values that have a reference range.
        diseases: of the seven, in their order.
        gaps: kind of question -> why it cannot be answered from the labels.
    """

    study_id: str
    patient_id: str
    split: str
    ecg_path: str
    cxr_path: str
    statements: tuple[str, ...] = ()
    film: Mapping[str, str] = field(default_factory=dict)
    labs: tuple[LabReading, ...] = ()
    diseases: tuple[str, ...] = ()
    gaps: Mapping[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> tuple[str, ...]:
        """The modalities of which there are labels."""
        return tuple(m for m, there in (("ecg", self.statements), ("cxr", self.film), ("lab", self.labs)) if there)


@dataclass(slots=True, kw_only=True)
class Labelled:
    """All studies of the tables, in their order, what was set aside, and counts of the labels by table."""

    studies: list[StudyLabels]
    problems: list[Problem]
    counts: dict[str, Counter[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ids:
    """The ids by which one study is found in the tables; "" where it has none."""

    ecg: str
    film: str
    stay: str


def read_labels(
    config: DataConfig, sources: LabelSources, kinds: Sequence[QAKind], limit: int | None = None
) -> Labelled:
    """Reads the splits' tables and joins the labels to their studies.

    Args:
        limit: at most so many studies of each split, the first.

    Raises:
        DataError: a table is missing or lacks a column.
    """
    ranges = read_ranges(sources.lab_ranges)
    rows, problems = _study_rows(config)
    rows = [row for split in config.splits for row in [r for r in rows if r.split == split][:limit]]
    counts = {name: Counter[str]() for name in ("ecg", "cxr", "lab", "icd")}
    ids = _ids(config, rows, stays="diagnosis" in kinds)
    patients = {name: {getattr(ids[row.study_id], name): row.patient_id for row in rows} for name in _Ids.__slots__}
    diagnosis = "diagnosis" in kinds
    ecg = _statements(sources.ecg, patients["ecg"], counts["ecg"]) if diagnosis or "ecg" in kinds else {}
    film = _films(sources.cxr, patients["film"], counts["cxr"]) if diagnosis or "cxr" in kinds else {}
    codes = _codes(sources.icd, patients["stay"], counts["icd"]) if diagnosis else {}
    studies = []
    for row in rows:
        own = ids[row.study_id]
        found = codes.get(own.stay)
        diseases, why = (
            diseases_of_stay(found, sources.icd_rules, counts["icd"]) if found else (None, "no row in the ICD table")
        )
        studies.append(
            _with_gaps(
                row=row,
                statements=ecg.get(own.ecg, ()) if row.ecg_path else (),
                film=film.get(own.film, {}) if row.cxr_path else {},
                labs=readings(row.labs.values, ranges),
                diseases=diseases or (),
                why=why or ("" if diseases else "none of the seven diseases"),
            )
        )
        counts["lab"].update(reading.level for reading in studies[-1].labs)
    return Labelled(studies=studies, problems=problems, counts=counts)


def _study_rows(config: DataConfig) -> tuple[list[StudyRow], list[Problem]]:
    """The rows that a study store of this configuration would keep: a patient stays in one split."""
    rows: list[StudyRow] = []
    problems: list[Problem] = []
    for split in config.tables:
        table = read_rows(config, split)
        rows += table.rows
        problems += table.problems
    kept, refused = check_ids(rows, config.splits)
    return kept, problems + refused


def _ids(config: DataConfig, rows: Sequence[StudyRow], stays: bool) -> dict[str, _Ids]:
    key, required = config.id_column, ("hadm_id",) if stays else ()
    links: dict[str, dict[str, str]] = {}
    for file in config.tables.values():
        wanted = {row.study_id for row in rows if row.file == file}
        for cells in rows_of(Path(config.root) / file, key, wanted, required, r"hadm_id|(?:ecg|cxr)_study_id"):
            links[cells[key]] = cells
    ids = {}
    for row in rows:
        cells = links[row.study_id]
        ids[row.study_id] = _Ids(
            ecg=plain_id(cells.get("ecg_study_id", "")) or _id_of_path(row.ecg_path),
            film=plain_id(cells.get("cxr_study_id", "")) or _id_of_path(row.cxr_path),
            stay=plain_id(cells.get("hadm_id", "")),
        )
    return ids


def _id_of_path(path: str) -> str:
    """The study id in a path of the published layout: of its sNNN folder, else of the file's name."""
    parts = plain_path(path).split("/") if path else []
    folders = [part[1:] for part in parts[:-1] if re.fullmatch(r"s\d+", part)]
    return folders[-1] if folders else re.sub(r"\..*", "", parts[-1]) if parts else ""


def _own_rows(
    path: Path | None,
    option: str,
    key: str,
    patients: Mapping[str, str],
    counts: Counter[str],
    columns: tuple[str, ...],
) -> Iterator[dict[str, str]]:
    """The rows of known ids whose patient is the study's; rows of another patient are counted."""
    if path is None:
        raise DataError(f"{option}: no table is given; name it, or leave out the kinds of questions that need it")
    for row in rows_of(path, key, [known for known in patients if known], ("subject_id", *columns), _REPORTS):
        if plain_id(row["subject_id"]) == patients[row[key]]:
            yield row
        else:
            counts["rows whose patient is not the study's"] += 1


def _statements(path: Path | None, patients: Mapping[str, str], counts: Counter[str]) -> dict[str, tuple[str, ...]]:
    """ECG study id -> its statements. Of an ECG in two rows the first counts."""
    found: dict[str, tuple[str, ...]] = {}
    for row in _own_rows(path, "--ecg-table", "study_id", patients, counts, ("report_0",)):
        if row["study_id"] in found:
            counts["rows of an ECG that has one already"] += 1
            continue
        texts = [clean_statement(text) for name, text in row.items() if re.fullmatch(_REPORTS, name)]
        kept = [text for text in dict.fromkeys(texts) if text and not _TECHNICAL.search(text)]
        counts["statements"] += len(kept)
        counts["technical remarks left out"] += sum(1 for text in texts if text) - len(kept)
        found[row["study_id"]] = tuple(kept)
    return found


def clean_statement(text: str) -> str:
    """A machine statement as one clause: without ornaments, colons, tags and full stops.

    "*** Atrial fibrillation." -> "Atrial fibrillation".
    """
    plain = " ".join(re.sub(r"[<>*|]+", " ", text).replace(":", " -").split())
    return re.sub(r"\.(?=\s)", ",", re.sub(r"^[^\w(]+|[^\w)%]+$", "", plain))


def _films(path: Path | None, patients: Mapping[str, str], counts: Counter[str]) -> dict[str, dict[str, str]]:
    """Film study id -> label -> value. Of a film in two rows the first counts."""
    found: dict[str, dict[str, str]] = {}
    for row in _own_rows(path, "--cxr-table", "study_id", patients, counts, CXR_LABELS):
        if row["study_id"] in found:
            counts["rows of a film that has one already"] += 1
            continue
        labels = {}
        for name in CXR_LABELS:
            value = _CXR_VALUES.get(plain_id(row[name]))
            if value is not None:
                labels[name] = value
                counts[f"labels {value}"] += 1
            elif row[name]:
                counts["labels of an unknown value"] += 1
        found[row["study_id"]] = labels
    return found


def _codes(path: Path | None, patients: Mapping[str, str], counts: Counter[str]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in _own_rows(path, "--icd-table", "hadm_id", patients, counts, ("icd_code", "icd_version")):
        found[row["hadm_id"]].append((row["icd_code"], plain_id(row["icd_version"])))
    return found


def _with_gaps(
    *,
    row: StudyRow,
    statements: tuple[str, ...],
    film: Mapping[str, str],
    labs: tuple[LabReading, ...],
    diseases: tuple[str, ...],
    why: str,
) -> StudyLabels:
    """The study's labels, and which kinds of questions they cannot answer.

    A diagnosis needs labels of every modality that was taken: a chain of evidence must not call an ECG unavailable
    only because its statements are.
    """
    gaps = {
        "ecg": "" if statements else "ECG without statements" if row.ecg_path else "no ECG taken",
        "cxr": "" if film else "film without labels" if row.cxr_path else "no film taken",
        "lab": "" if labs else "no laboratory value with a reference range",
    }
    unlabelled = [gap for gap, path in ((gaps["ecg"], row.ecg_path), (gaps["cxr"], row.cxr_path)) if gap and path]
    if not (statements or film or labs):
        unlabelled.append("no modality has labels")
    gaps["diagnosis"] = why or next(iter(unlabelled), "")
    return StudyLabels(
        study_id=row.study_id,
        patient_id=row.patient_id,
        split=row.split,
        ecg_path=row.ecg_path,
        cxr_path=row.cxr_path,
        statements=statements,
        film=film,
        labs=labs,
        diseases=diseases,
        gaps={kind: gap for kind, gap in gaps.items() if gap},
    )


def gap_counts(studies: Collection[StudyLabels], kinds: Sequence[QAKind]) -> dict[str, Counter[str]]:
    """Kind of question -> reason -> how many studies cannot be asked it."""
    return {kind: Counter(study.gaps[kind] for study in studies if kind in study.gaps) for kind in kinds}
