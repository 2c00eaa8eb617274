"""Reads one patient from files that belong to no data root, as when a trained model is asked.

Owns: putting the readers together. Does not own: the formats (ecg.py, cxr.py, labs.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medtvt_rl.data.config import FilmConfig
from medtvt_rl.data.cxr import read_film
from medtvt_rl.data.ecg import read_ecg
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labs import NUM_LABS, PercentileTable, read_patient_labs
from medtvt_rl.types import Study


def read_patient(
    *, ecg: Path | None, cxr: Path | None, labs: Path | None, film: FilmConfig, table: PercentileTable
) -> Study:
    """One patient from an ECG (WFDB or DICOM), a film (JPEG, PNG, DICOM) and raw laboratory values (json or CSV).

    Args:
        film: size and crop that the model was trained with.
        table: percentiles of the training split, from StudyStore.percentile_table.

    Raises:
        DataError: none is given, or one cannot be read.
    """
    if ecg is None and cxr is None and labs is None:
        raise DataError("patient: no ECG, no film and no laboratory values; give at least one")
    values = np.full(NUM_LABS, np.nan) if labs is None else read_patient_labs(labs)
    percentiles = table.percentiles(values)
    return Study(
        study_id="patient",
        patient_id="patient",
        ecg=None if ecg is None else read_ecg(ecg),
        cxr=None if cxr is None else read_film(cxr, film),
        lab_percentiles=percentiles,
        lab_measured=~np.isnan(percentiles),
    )
