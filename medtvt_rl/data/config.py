"""Settings of the study store and of the simulated cohort. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Crop = Literal["whole", "center", "published"]
Normalisation = Literal["centred", "imagenet"]
Questions = Literal["given", "built"]
TRAIN, VALIDATION = "train", "validation"


@dataclass
class FilmConfig:
    """How a chest film becomes the square that the model sees.

    Attributes:
        size: side of the stored square, pixels.
        crop: "whole" pads the film to a square; "center" keeps the central square; "published" keeps the central
            224/400 of the shorter side, as the published evaluation of MedTVT-R1 does.
    """

    size: int = 96
    crop: Crop = "whole"


@dataclass
class DataConfig:
    """Where the studies are, in the published layout, and where their validated copy is cached.

    Attributes:
        root: folder with labs CSV files, ECG records, films and QA json; every path in data files stays inside it.
        labs_csv: one CSV per split, relative to root; null for a split without one.
        id_column: the column of labs_csv that names the study; "hadm_id" in Symile-MIMIC.
        only_rows: column -> the value that a row must have to be read; a table without the column is read whole.
            Symile-MIMIC's test.csv marks its own rows by {label: "1"}; the others are candidates for retrieval.
        validation_share: where labs_csv has no validation split, this share of the training patients becomes it, chosen
            by a hash of the patient id; 0 takes none.
        ecg_folder, cxr_folder: what paths of ECGs and films count from, relative to root or absolute (MIMIC may lie
            elsewhere); no path in a data file leaves it.
        labs_means: json of mean percentiles, which stand where an item was not measured, relative to root; null takes
            those of the training table.
        qa: one json per kind and split; {split} and {kind} are replaced, kinds are ecg, cxr, lab, diagnosis.
        qa_files: KIND_SPLIT, such as diagnosis_train, -> file relative to root, where its name does not follow `qa`.
        questions: "given" reads the files of `qa_files`, and by `qa` what is not named there; "built" reads by `qa`
            alone, what `medtvt-rl build-qa` wrote.
        findings_csv: labels of findings per study, relative to root; None where there are none.
        store: folder of the Arrow study store that every process memory-maps.
        num_workers: processes that read and validate; 0 means one per core.
        max_unusable_share: more unusable studies than this end the build.
    """

    root: str = "data"
    labs_csv: dict[str, str | None] = field(
        default_factory=lambda: {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
    )
    id_column: str = "study_id"
    only_rows: dict[str, str] = field(default_factory=dict)
    validation_share: float = 0.0
    ecg_folder: str = ""
    cxr_folder: str = ""
    labs_means: str | None = "labs_means.json"
    qa: str = "qa/{kind}_{split}.json"
    qa_files: dict[str, str] = field(default_factory=dict)
    questions: Questions = "given"
    findings_csv: str | None = "findings.csv"
    store: str = "${.root}/store"
    film: FilmConfig = field(default_factory=FilmConfig)
    num_workers: int = 0
    max_unusable_share: float = 0.05

    @property
    def tables(self) -> dict[str, str]:
        """Split -> its CSV, of the splits that have one."""
        return {split: file for split, file in self.labs_csv.items() if file}

    @property
    def takes_validation(self) -> bool:
        """Whether the validation split is taken out of the training patients."""
        return self.validation_share > 0 and VALIDATION not in self.tables

    def table_split(self, split: str) -> str:
        """The split whose table, and whose files of questions, hold the studies of `split`."""
        return TRAIN if split == VALIDATION and self.takes_validation else split

    def qa_file(self, kind: str, split: str) -> str:
        """The file of questions of one kind that belongs to the table of `split`, relative to root."""
        by_name = self.qa.format(kind=kind, split=split)
        return by_name if self.questions == "built" else self.qa_files.get(f"{kind}_{split}", by_name)

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split; the one that is taken out of the training patients stands behind them."""
        names = list(self.tables)
        if self.takes_validation:
            names.insert(1 + names.index("train") if "train" in names else 0, VALIDATION)
        return tuple(names)

    @property
    def ecg_root(self) -> Path:
        """The folder that paths of ECGs count from."""
        return Path(self.root) / self.ecg_folder

    @property
    def cxr_root(self) -> Path:
        """The folder that paths of films count from."""
        return Path(self.root) / self.cxr_folder


@dataclass
class CohortConfig:
    """The simulated cohort that `medtvt-rl cohort` writes in the published formats; scores on it mean nothing
    clinically.

    Attributes:
        num_train, num_validation, num_test: studies per split; splits share no patient.
        film_size: side of the rendered film, pixels.
        missing_share: share of studies that lack one modality.
        layout: `plain`, the files that the defaults of `data` name; `published`, folders, names, columns and joins of
            MIMIC-IV-ECG, MIMIC-CXR-JPG, Symile-MIMIC and MedTVT-QA, which configs/medtvt_r1.yaml reads.
    """

    num_train: int = 1500
    num_validation: int = 150
    num_test: int = 300
    seed: int = 0
    film_size: int = 128
    missing_share: float = 0.03
    layout: Literal["plain", "published"] = "plain"
