"""The files of a simulated cohort as MedTVT-R1's README lays them out (https://github.com/keke-nice/MedTVT-R1).

Owns: names, columns and joins: ECGs as in MIMIC-IV-ECG 1.0, films as in MIMIC-CXR-JPG 2.1.0, tables as in Symile-MIMIC
1.0.0 (https://doi.org/10.13026/3vvj-s428), questions as in MedTVT-QA. Does not own: what is in the files (plan.py).
Studies are hospital admissions; questions name them by the path of an ECG or a film alone; there are none about the
validation table. The tables of labels that `build-qa` reads lie where MIMIC-IV-ECG, MIMIC-CXR-JPG and MIMIC-IV have
theirs.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtvt_rl.data.labs import LAB_IDS, PERCENTILE_SUFFIX, PercentileTable
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

ECG_FOLDER = "Dataset/mimic-iv-ecg-diagnostic-electrocardiogram-matched-subset-1.0"
CXR_FOLDER = "Dataset/mimic-cxr-jpg-chest-radiographs-with-structured-labels-2.1.0"
LABEL_TABLES = {
    "ecg": f"{ECG_FOLDER}/{ECG_TABLE}",
    "cxr": f"{CXR_FOLDER}/{CXR_TABLE}.gz",
    "icd": f"Dataset/mimic-iv/hosp/{ICD_TABLE}.gz",
}
TABLES = {
    "train": "Dataset/symile-mimic/train.csv",
    "validation": "Dataset/symile-mimic/val.csv",
    "test": "Dataset/symile-mimic/test.csv",
}
QUESTIONS = {
    ("ecg", "train"): "train_ecg_qa_dataset_gpt_add_spec_token.json",
    ("cxr", "train"): "train_cxr_qa_dataset_gpt_add_spec_token.json",
    ("lab", "train"): "train_lab_qa_dataset_gpt_add_spec_token.json",
    ("diagnosis", "train"): "train_dig_qa_dataset_gpt_7_category_refine_add_spec_token.json",
    ("diagnosis", "test"): "test_dig_qa_dataset_gpt_7_category_add_spec_token.json",
}
_CHEXPERT = {
    "Atelectasis": None,
    "Cardiomegaly": "cardiomegaly",
    "Edema": "edema",
    "Lung Opacity": "consolidation",
    "No Finding": None,
    "Pleural Effusion": "effusion",
}
_CANDIDATES = 2
_STUDY_ID_STEP = 10_000_000


class PublishedLayout:
    """See the module."""

    def paths(self, plan: Plan, index: int) -> dict[str, str]:
        """See Layout."""
        folders = {"ecg": ECG_FOLDER, "cxr": CXR_FOLDER}
        return {modality: path and f"{folders[modality]}/{path}" for modality, path in self._own(plan, index).items()}

    def _own(self, plan: Plan, index: int) -> dict[str, str]:
        """Paths as tables and questions give them, from the dataset's own folder."""
        number, patient = int(plan.ids[index][0]), plan.ids[index][1]
        film = hashlib.sha256(plan.ids[index][0].encode()).hexdigest()[:40]
        dicom = "-".join(film[start : start + 8] for start in range(0, 40, 8))
        paths = {
            "ecg": f"files/p{patient[:4]}/p{patient}/s{number}/{number}",
            "cxr": f"files/p{patient[:2]}/p{patient}/s{_ids(str(number))['film_id']}/{dicom}.jpg",
        }
        return {modality: "" if plan.missing[index] == modality else path for modality, path in paths.items()}

    def write(
        self, root: Path, plans: Sequence[Plan], findings: Sequence[Sequence[Findings]], table: PercentileTable
    ) -> None:
        """See Layout."""
        (root / "QA").mkdir()
        (root / "Dataset/symile-mimic").mkdir(parents=True)
        means = {item + PERCENTILE_SUFFIX: float(mean) for item, mean in zip(LAB_IDS, table.mean_percentiles())}
        (root / "QA/labs_means.json").write_text(json.dumps(means, indent=4))
        for plan, found in zip(plans, findings):
            self._write_table(root / TABLES[plan.split], plan, found, table)
            self._write_questions(root / "QA", plan, found)
        tables = LabelTables(**{name: root / file for name, file in LABEL_TABLES.items()})
        write_label_tables(tables, simulated_labels(plans, findings, _ids), plans[0].seed[0])

    def _write_table(self, path: Path, plan: Plan, findings: Sequence[Findings], table: PercentileTable) -> None:
        rows = []
        for index, (study_id, patient_id) in enumerate(plan.ids):
            paths, shown = self._own(plan, index), findings[index]["cxr"] or {}
            labels = ["1.0" if key and shown.get(key) else "" for key in _CHEXPERT.values()]
            cells = [*plan.labs[index], *table.percentiles(plan.labs[index]).astype(float)]
            numbers = ["" if np.isnan(cell) else repr(float(cell)) for cell in cells]
            rows.append([patient_id, study_id, paths["cxr"], *labels, paths["ecg"], *numbers])
        header = ["subject_id", "hadm_id", "cxr_path", *_CHEXPERT, "ecg_path", *LAB_IDS]
        header += [item + PERCENTILE_SUFFIX for item in LAB_IDS]
        if plan.split == "test":
            header, rows = [*header, "label_hadm_id", "label"], _with_candidates(rows)
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    def _write_questions(self, folder: Path, plan: Plan, findings: Sequence[Findings]) -> None:
        entries: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*MODALITIES, "diagnosis")}
        for index, kind, messages in plan.dialogues(findings):
            paths = self._own(plan, index)
            key, path = ("ECG", paths["ecg"]) if kind in ("ecg", "diagnosis") else ("image", paths["cxr"])
            if not path:
                key, path = ("image", paths["cxr"]) if key == "ECG" else ("ECG", paths["ecg"])
            tokens = "<ecg><cxr><lab>" if kind == "diagnosis" else f"<{kind}>"
            messages[0]["content"] = f"{tokens}\n{messages[0]['content']}"
            entries[kind].append({"messages": messages, key: [path]})
        for kind, rows in entries.items():
            if (kind, plan.split) in QUESTIONS:
                (folder / QUESTIONS[kind, plan.split]).write_text(json.dumps(rows, indent=4))


def _ids(study_id: str) -> dict[str, str]:
    """Of a study's ECG, film and stay: it is named by its stay."""
    return {"ecg_id": study_id, "film_id": str(int(study_id) + _STUDY_ID_STEP), "stay_id": study_id}


def _with_candidates(rows: list[list[Any]]) -> list[list[Any]]:
    """The rows, marked 1, then for each a few others, marked 0, as candidates for its retrieval."""
    others = [
        [*rows[(index + step) % len(rows)], row[1], "0"]
        for index, row in enumerate(rows)
        for step in range(1, 1 + _CANDIDATES)
    ]
    return [[*row, row[1], "1"] for row in rows] + others
