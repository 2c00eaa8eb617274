"""Settings of the study store and of the simulated cohort. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class FilmConfig:
    """How a chest film becomes the square that the model sees.

    Attributes:
        size: side of the stored square, pixels.
        crop: "whole" pads the film to a square; "center" keeps the central square.
    """

    size: int = 96
    crop: Literal["whole", "center"] = "whole"


@dataclass
class DataConfig:
    """Where the studies are, in the published layout, and where their validated copy is cached.

    Attributes:
        root: folder with labs CSV files, ECG records, films and QA json; every path in data files stays inside it.
        labs_csv: one CSV per split, relative to root.
        labs_means: json of mean percentiles, relative to root.
        qa: one json per kind and split; {split} and {kind} are replaced, kinds are ecg, cxr, lab, diagnosis.
        findings_csv: labels of findings per study, relative to root; None where there are none.
        store: folder of the Arrow study store that every process memory-maps.
        num_workers: processes that read and validate; 0 means one per core.
        max_unusable_share: more unusable studies than this end the build.
    """

    root: str = "data"
    labs_csv: dict[str, str] = field(
        default_factory=lambda: {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
    )
    labs_means: str = "labs_means.json"
    qa: str = "qa/{kind}_{split}.json"
    findings_csv: str | None = "findings.csv"
    store: str = "${.root}/store"
    film: FilmConfig = field(default_factory=FilmConfig)
    num_workers: int = 0
    max_unusable_share: float = 0.05


@dataclass
class CohortConfig:
    """The simulated cohort that `medtvt-rl cohort` writes in the published formats; scores on it mean nothing
    clinically.

    Attributes:
        num_train, num_validation, num_test: studies per split; splits share no patient.
        film_size: side of the rendered film, pixels.
        missing_share: share of studies that lack one modality.
    """

    num_train: int = 1500
    num_validation: int = 150
    num_test: int = 300
    seed: int = 0
    film_size: int = 128
    missing_share: float = 0.03
