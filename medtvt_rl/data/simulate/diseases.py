"""Draws which of the seven diseases a simulated patient has.

Owns: prevalences and the correlations between diseases. Does not own: what a disease does to a measurement
(findings.py, labs.py). A Gaussian vector with tetrachoric correlations is cut at each disease's prevalence; a patient
with none of the seven is drawn again, because the cohort that is imitated holds none.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.labels import DISEASES

PREVALENCE = {
    "Coronary Artery Disease": 0.47,
    "Acute Renal Failure": 0.37,
    "Hypertension": 0.60,
    "Atrial Fibrillation": 0.38,
    "Pneumonia": 0.18,
    "Diabetes Mellitus": 0.35,
    "Sepsis": 0.30,
}
"""Before patients without any disease are drawn again, which raises each share by a few per cent."""

_CORRELATIONS = (
    ("Coronary Artery Disease", "Hypertension", 0.30),
    ("Coronary Artery Disease", "Diabetes Mellitus", 0.30),
    ("Hypertension", "Diabetes Mellitus", 0.30),
    ("Coronary Artery Disease", "Atrial Fibrillation", 0.15),
    ("Hypertension", "Atrial Fibrillation", 0.10),
    ("Acute Renal Failure", "Sepsis", 0.40),
    ("Pneumonia", "Sepsis", 0.45),
    ("Acute Renal Failure", "Diabetes Mellitus", 0.12),
    ("Acute Renal Failure", "Atrial Fibrillation", 0.12),
    ("Acute Renal Failure", "Hypertension", 0.02),
    ("Acute Renal Failure", "Pneumonia", 0.12),
    ("Sepsis", "Hypertension", -0.12),
    ("Sepsis", "Coronary Artery Disease", -0.10),
    ("Coronary Artery Disease", "Acute Renal Failure", 0.05),
    ("Atrial Fibrillation", "Sepsis", 0.05),
)


def correlation_matrix() -> NDArray[np.float64]:
    """[7, 7] correlations of the latent Gaussians, in the order of DISEASES."""
    matrix = np.eye(len(DISEASES))
    for first, second, value in _CORRELATIONS:
        i, j = DISEASES.index(first), DISEASES.index(second)
        matrix[i, j] = matrix[j, i] = value
    return matrix


def draw_diseases(rng: np.random.Generator, num_patients: int) -> NDArray[np.bool_]:
    """[N, 7] bool in the order of DISEASES; every row has at least one."""
    thresholds = np.array([NormalDist().inv_cdf(PREVALENCE[name]) for name in DISEASES])
    factor = np.linalg.cholesky(correlation_matrix())
    diseases = np.zeros((num_patients, len(DISEASES)), dtype=bool)
    none: NDArray[np.bool_] = np.ones(num_patients, dtype=bool)
    while none.any():
        latent = rng.standard_normal((int(none.sum()), len(DISEASES))) @ factor.T
        diseases[none] = latent < thresholds
        none = np.logical_not(diseases.any(axis=1))
    return diseases
