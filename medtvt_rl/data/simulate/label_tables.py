"""Writes the structured labels of simulated studies as MIMIC-IV-ECG, MIMIC-CXR-JPG and MIMIC-IV publish theirs.

Owns: the three tables and the words in them: machine statements, CXR labels, billing codes. Does not own: findings and
diseases themselves, or the ids and places of a layout. The tables are what `build-qa` reads; some stays carry further
codes, as real ones do.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.qa.labels import CXR_LABELS, NO_FINDING
from medtvt_rl.data.simulate.plan import Findings, Plan

ECG_TABLE, CXR_TABLE, ICD_TABLE = "machine_measurements.csv", "mimic-cxr-2.0.0-chexpert.csv", "diagnoses_icd.csv"
_NUM_REPORTS = 18
_STATEMENTS = {
    "lvh": "Left ventricular hypertrophy",
    "st_depression": "ST depression",
    "q_wave": "Abnormal Q waves",
    "peaked_t": "Tall T waves",
}
_FILM = {
    "cardiomegaly": "Cardiomegaly",
    "consolidation": "Consolidation",
    "effusion": "Pleural Effusion",
    "edema": "Edema",
}
_CODES = dict(zip(DISEASES, ("I2510", "N179", "I10", "I4891", "J189", "E119", "A419")))
_FURTHER_CODES = ("E785", "K219", "Z87891", "D649")
_SAID_TO_BE_ABSENT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTables:
    """Where the tables lie; one that ends in .gz is compressed."""

    ecg: Path
    cxr: Path
    icd: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedLabels:
    """What is known of one simulated study; the findings of a modality that was not taken are None."""

    patient_id: str
    ecg_id: str
    film_id: str
    stay_id: str
    findings: Mapping[str, Mapping[str, bool] | None]
    diseases: frozenset[str]


def simulated_labels(
    plans: Sequence[Plan], findings: Sequence[Sequence[Findings]], ids: Callable[[str], dict[str, str]]
) -> list[SimulatedLabels]:
    """What is known of every study.

    Args:
        ids: study id -> its ecg_id, film_id and stay_id.
    """
    return [
        SimulatedLabels(patient_id=patient_id, findings=shown, diseases=plan.names(index), **ids(study_id))
        for plan, found in zip(plans, findings)
        for index, ((study_id, patient_id), shown) in enumerate(zip(plan.ids, found))
    ]


def write_label_tables(paths: LabelTables, studies: Sequence[SimulatedLabels], seed: int) -> None:
    """Writes the three tables; a modality that was not taken has no row."""
    rng = np.random.default_rng([seed, 5])
    reports = [f"report_{number}" for number in range(_NUM_REPORTS)]
    ecg, film, stays = [], [], []
    for study in studies:
        ecg_findings, film_findings = study.findings["ecg"], study.findings["cxr"]
        if ecg_findings is not None:
            texts = _statements(ecg_findings)
            ecg.append([study.patient_id, study.ecg_id, *texts, *[""] * (_NUM_REPORTS - len(texts))])
        if film_findings is not None:
            labels = _film_labels(film_findings, rng)
            film.append([study.patient_id, study.film_id, *(labels.get(name, "") for name in CXR_LABELS)])
        codes = [_CODES[name] for name in DISEASES if name in study.diseases]
        codes += [code for code in _FURTHER_CODES if rng.random() < 0.3]
        stays += [[study.patient_id, study.stay_id, number, code, 10] for number, code in enumerate(codes, start=1)]
    _write(paths.ecg, ["subject_id", "study_id", *reports], ecg)
    _write(paths.cxr, ["subject_id", "study_id", *CXR_LABELS], film)
    _write(paths.icd, ["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"], stays)


def _statements(findings: Mapping[str, bool]) -> list[str]:
    if findings["afib"]:
        rapid = " with rapid ventricular response" if findings["tachycardia"] else ""
        texts = [f"Atrial fibrillation{rapid}"]
    else:
        texts = ["Sinus tachycardia" if findings["tachycardia"] else "Sinus rhythm"]
    texts += [text for key, text in _STATEMENTS.items() if findings[key]]
    return [*texts, "Abnormal ECG" if any(findings.values()) else "Normal ECG"]


def _film_labels(findings: Mapping[str, bool], rng: np.random.Generator) -> dict[str, str]:
    """1.0 for what shows, 0.0 for some of what does not; the others are not mentioned."""
    labels = {}
    for key, name in _FILM.items():
        mentioned = rng.random() < _SAID_TO_BE_ABSENT
        if findings[key]:
            labels[name] = "1.0"
        elif mentioned:
            labels[name] = "0.0"
    return labels if "1.0" in labels.values() else {**labels, NO_FINDING: "1.0"}


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    content = text.getvalue().encode()
    # Without the time of writing, so that the same cohort gives the same bytes.
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
