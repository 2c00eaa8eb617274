"""The files of a simulated cohort as the defaults of `data` name them.

Owns: these names and columns. Does not own: what is in the files (plan.py).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtvt_rl.data.labels import ALL_FINDINGS
from medtvt_rl.data.labs import LAB_IDS, PERCENTILE_SUFFIX, PercentileTable
from medtvt_rl.data.medtvt_qa import qa_entry
from medtvt_rl.data.simulate.label_tables import (
    CXR_TABLE,
    ECG_TABLE,
    ICD_TABLE,
    LabelTables,
    simulated_labels,
    write_label_tables,
)
from medtvt_rl.data.simulate.plan import Findings, Plan
from medtvt_rl.types import MODALITIES

LABELS = "labels"
_STAY_ID_STEP = -20_000_000


class PlainLayout:
    """ecg/SPLIT/STUDY, cxr/SPLIT/STUDY.jpg, SPLIT.csv, qa/KIND_SPLIT.json, findings.csv, labs_means.json, labels/."""

    def paths(self, plan: Plan, index: int) -> dict[str, str]:
        """See Layout."""
        study_id = plan.ids[index][0]
        paths = {"ecg": f"ecg/{plan.split}/{study_id}", "cxr": f"cxr/{plan.split}/{study_id}.jpg"}
        return {modality: "" if plan.missing[index] == modality else path for modality, path in paths.items()}

    def write(
        self, root: Path, plans: Sequence[Plan], findings: Sequence[Sequence[Findings]], table: PercentileTable
    ) -> None:
        """See Layout."""
        (root / "qa").mkdir()
        means = dict(zip(LAB_IDS, table.mean_percentiles().astype(float).round(6).tolist()))
        (root / "labs_means.json").write_text(json.dumps(means, indent=1))
        with (root / "findings.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["study_id", *ALL_FINDINGS])
            for plan, found in zip(plans, findings):
                writer.writerows(_finding_rows(plan, found))
                self._write_labs(root / f"{plan.split}.csv", plan, table)
                self._write_questions(root / "qa", plan, found)
        folder = root / LABELS
        tables = LabelTables(ecg=folder / ECG_TABLE, cxr=folder / CXR_TABLE, icd=folder / ICD_TABLE)
        write_label_tables(tables, simulated_labels(plans, findings, _ids), plans[0].seed[0])

    def _write_labs(self, path: Path, plan: Plan, table: PercentileTable) -> None:
        percentiles = table.percentiles(plan.labs)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = [name for item in LAB_IDS for name in (item, item + PERCENTILE_SUFFIX)]
            writer.writerow(["study_id", "subject_id", "hadm_id", "ecg_path", "cxr_path", *columns])
            for index, (study_id, patient_id) in enumerate(plan.ids):
                paths = self.paths(plan, index)
                cells = []
                for value, percentile in zip(plan.labs[index], percentiles[index]):
                    cells += ["", ""] if np.isnan(value) else [f"{value:g}", f"{percentile:.6f}"]
                writer.writerow([study_id, patient_id, _ids(study_id)["stay_id"], paths["ecg"], paths["cxr"], *cells])

    def _write_questions(self, folder: Path, plan: Plan, findings: Sequence[Findings]) -> None:
        entries: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*MODALITIES, "diagnosis")}
        for index, kind, (asked, answered) in plan.dialogues(findings):
            paths = self.paths(plan, index)
            entry = qa_entry(asked["content"], answered["content"], plan.ids[index][0], paths["ecg"], paths["cxr"])
            entries[kind].append(entry)
        for kind, rows in entries.items():
            (folder / f"{kind}_{plan.split}.json").write_text(json.dumps(rows, indent=0))


def _ids(study_id: str) -> dict[str, str]:
    return {"ecg_id": study_id, "film_id": study_id, "stay_id": str(int(study_id) + _STAY_ID_STEP)}


def _finding_rows(plan: Plan, findings: Sequence[Findings]) -> list[list[str]]:
    rows = []
    for (study_id, _), by_modality in zip(plan.ids, findings):
        shown = {key: has for found in by_modality.values() if found for key, has in found.items()}
        rows.append([study_id, *(str(int(shown.get(key, False))) for key in ALL_FINDINGS)])
    return rows
