"""Writes a simulated cohort in the published layout: WFDB records, JPEG films, laboratory CSV, question-answer json.

Owns: who is in which split, the files, and their atomic appearance. Does not own: how a modality looks (ecg.py, cxr.py,
labs.py). The folder is written beside its place and renamed, so that a cohort is either whole or absent; one
configuration always gives the same files.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.config import CohortConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import ALL_FINDINGS, DISEASES, FINDINGS
from medtvt_rl.data.labs import LAB_IDS, PERCENTILE_SUFFIX, PercentileTable, read_json
from medtvt_rl.data.medtvt_qa import qa_entry
from medtvt_rl.data.parallel import Progress, ordered_map
from medtvt_rl.data.simulate.diseases import draw_diseases
from medtvt_rl.data.simulate.findings import lab_findings
from medtvt_rl.data.simulate.label_tables import LABELS, SimulatedLabels, stay_id, write_label_tables
from medtvt_rl.data.simulate.labs import draw_labs
from medtvt_rl.data.simulate.render import RenderTask, render_study
from medtvt_rl.data.simulate.texts import chain_of_evidence, question, section
from medtvt_rl.types import MODALITIES

FORMAT_VERSION = 2
MARKER = "cohort.json"
SPLITS = ("train", "validation", "test")
_FIRST_STUDY_ID = 40_000_001
_FIRST_PATIENT_ID = 10_000_001


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One split before rendering: diseases [N, 7], raw labs [N, 50], and per study the modality that is missing."""

    split: str
    ids: list[tuple[str, str]]
    diseases: NDArray[np.bool_]
    labs: NDArray[np.float64]
    missing: list[str | None]

    def names(self, index: int) -> frozenset[str]:
        return frozenset(name for name, has in zip(DISEASES, self.diseases[index]) if has)

    def paths(self, index: int) -> dict[str, str]:
        """Relative paths of ECG and film; empty where the modality is missing."""
        study_id = self.ids[index][0]
        paths = {"ecg": f"ecg/{self.split}/{study_id}", "cxr": f"cxr/{self.split}/{study_id}.jpg"}
        return {modality: "" if self.missing[index] == modality else path for modality, path in paths.items()}


def write_cohort(config: CohortConfig, root: Path, progress: Progress | None = None) -> Path:
    """Writes the cohort to `root` and returns it; a cohort of the same configuration that lies there is kept.

    Args:
        progress: called with (studies rendered, studies in all).

    Raises:
        DataError: `root` holds something else, or a number in the configuration is out of range.
    """
    _check(config)
    marker = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    if _is_written(root, marker):
        return root
    partial = root.parent / f".{root.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_files(config, partial, progress)
        (partial / MARKER).write_text(json.dumps(marker, indent=1))
        try:
            partial.rename(root)
        except OSError:
            if not _is_written(root, marker):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _check(config: CohortConfig) -> None:
    for split in SPLITS:
        value = getattr(config, f"num_{split}")
        if value < 1:
            raise DataError(f"cohort.num_{split} is {value}, expected at least 1 study")
    if not 0 <= config.missing_share <= 1:
        raise DataError(f"cohort.missing_share is {config.missing_share}, expected a share in 0..1")
    if config.film_size < 32:
        raise DataError(f"cohort.film_size is {config.film_size}, expected at least 32 pixels")


def _is_written(root: Path, marker: dict[str, Any]) -> bool:
    """Whether this very cohort lies at `root`. Raises DataError if anything else does."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not root.is_dir() or not (root / MARKER).is_file():
        raise DataError(f"{root}: holds something that is no simulated cohort; choose another data.root")
    found = read_json(root / MARKER)
    differing = [
        f"{key} {found.get(key)!r} instead of {marker[key]!r}" for key in marker if found.get(key) != marker[key]
    ]
    if differing:
        raise DataError(f"{root}: holds another cohort ({', '.join(differing)}); remove it or choose another data.root")
    return True


def _write_files(config: CohortConfig, root: Path, progress: Progress | None) -> None:
    plans = _draw_plans(config)
    for split in SPLITS:
        for folder in ("ecg", "cxr"):
            (root / folder / split).mkdir(parents=True)
    (root / "qa").mkdir()
    tasks = [_render_task(config, root, plan, index) for plan in plans for index in range(len(plan.ids))]
    rendered = iter(list(ordered_map(render_study, tasks, progress=progress)))
    table = PercentileTable.fit(plans[0].labs)
    means = dict(zip(LAB_IDS, table.mean_percentiles().astype(float).round(6).tolist()))
    (root / "labs_means.json").write_text(json.dumps(means, indent=1))
    labels: list[SimulatedLabels] = []
    with (root / "findings.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["study_id", *ALL_FINDINGS])
        for plan in plans:
            findings = [_study_findings(plan, index, next(rendered)) for index in range(len(plan.ids))]
            writer.writerows(_finding_rows(plan, findings))
            labels += _label_rows(plan, findings)
            _write_labs(root / f"{plan.split}.csv", plan, table)
            _write_questions(
                root / "qa", plan, findings, np.random.default_rng([config.seed, SPLITS.index(plan.split), 0, 1])
            )
    write_label_tables(root / LABELS, labels, config.seed)


def _draw_plans(config: CohortConfig) -> list[_Plan]:
    plans, num_before = [], 0
    for number, split in enumerate(SPLITS):
        count = getattr(config, f"num_{split}")
        rng = np.random.default_rng([config.seed, number])
        diseases = draw_diseases(rng, count)
        labs = draw_labs(rng, diseases)
        missing = [
            str(rng.choice(MODALITIES)) if lacks else None
            for lacks in (rng.random(count) < config.missing_share).tolist()
        ]
        labs[[which == "lab" for which in missing]] = np.nan
        numbers = range(num_before, num_before + count)
        ids = [(str(_FIRST_STUDY_ID + i), str(_FIRST_PATIENT_ID + i)) for i in numbers]
        plans.append(_Plan(split=split, ids=ids, diseases=diseases, labs=labs, missing=missing))
        num_before += count
    return plans


def _render_task(config: CohortConfig, root: Path, plan: _Plan, index: int) -> RenderTask:
    paths = plan.paths(index)
    return RenderTask(
        seed=(config.seed, SPLITS.index(plan.split), index),
        diseases=plan.names(index),
        ecg_path=root / paths["ecg"] if paths["ecg"] else None,
        film_path=root / paths["cxr"] if paths["cxr"] else None,
        film_size=config.film_size,
    )


def _study_findings(plan: _Plan, index: int, rendered: dict[str, bool]) -> dict[str, dict[str, bool] | None]:
    """Findings by modality; None for the modality that is missing."""
    every = {**rendered, **lab_findings(plan.labs[index])}
    by_modality = {modality: {key: every[key] for key in keys} for modality, keys in FINDINGS.items()}
    return {modality: None if plan.missing[index] == modality else found for modality, found in by_modality.items()}


def _finding_rows(plan: _Plan, findings: list[dict[str, dict[str, bool] | None]]) -> list[list[str]]:
    rows = []
    for (study_id, _), by_modality in zip(plan.ids, findings):
        shown = {key: has for found in by_modality.values() if found for key, has in found.items()}
        rows.append([study_id, *(str(int(shown.get(key, False))) for key in ALL_FINDINGS)])
    return rows


def _label_rows(plan: _Plan, findings: list[dict[str, dict[str, bool] | None]]) -> list[SimulatedLabels]:
    return [
        SimulatedLabels(study_id=study_id, patient_id=patient_id, findings=found, diseases=plan.names(index))
        for index, ((study_id, patient_id), found) in enumerate(zip(plan.ids, findings))
    ]


def _write_labs(path: Path, plan: _Plan, table: PercentileTable) -> None:
    percentiles = table.percentiles(plan.labs)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [name for item in LAB_IDS for name in (item, item + PERCENTILE_SUFFIX)]
        writer.writerow(["study_id", "subject_id", "hadm_id", "ecg_path", "cxr_path", *columns])
        for index, (study_id, patient_id) in enumerate(plan.ids):
            paths = plan.paths(index)
            cells = []
            for value, percentile in zip(plan.labs[index], percentiles[index]):
                cells += ["", ""] if np.isnan(value) else [f"{value:g}", f"{percentile:.6f}"]
            writer.writerow([study_id, patient_id, stay_id(study_id), paths["ecg"], paths["cxr"], *cells])


def _write_questions(
    folder: Path, plan: _Plan, findings: list[dict[str, dict[str, bool] | None]], rng: np.random.Generator
) -> None:
    """One json per kind; a modality that is missing is not asked about."""
    entries: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*MODALITIES, "diagnosis")}
    for index, (study_id, _) in enumerate(plan.ids):
        answers = {m: section(rng, m, found) for m, found in findings[index].items() if found is not None}
        answers["diagnosis"] = chain_of_evidence(rng, findings[index], plan.names(index))
        paths = plan.paths(index)
        for kind, answer in answers.items():
            entries[kind].append(qa_entry(question(rng, kind), answer, study_id, paths["ecg"], paths["cxr"]))
    for kind, rows in entries.items():
        (folder / f"{kind}_{plan.split}.json").write_text(json.dumps(rows, indent=0))
