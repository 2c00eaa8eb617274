"""Draws which findings a simulated patient's diseases leave on the ECG and the film, and reads those of the labs.

Owns: penetrances (noisy-or) and laboratory thresholds. Does not own: how a finding looks (ecg.py, cxr.py). Penetrance
is imperfect and findings have other causes too, so that no modality alone solves the task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.labels import DISEASES, FINDINGS
from medtvt_rl.data.labs import LAB_IDS

CAD, ARF, HYPERTENSION, AFIB, PNEUMONIA, DIABETES, SEPSIS = DISEASES
TACHYCARDIA_BPM = 100.0


@dataclass(frozen=True, slots=True)
class Penetrance:
    """P(finding | diseases) = 1 - (1 - leak) * product over present causes of (1 - strength)."""

    leak: float
    causes: dict[str, float]

    def probability(self, diseases: frozenset[str]) -> float:
        """Of the finding in a patient with these diseases."""
        absent = 1.0 - self.leak
        for name, strength in self.causes.items():
            if name in diseases:
                absent *= 1.0 - strength
        return 1.0 - absent


PENETRANCE: dict[str, Penetrance] = {
    "afib": Penetrance(0.03, {AFIB: 0.85}),
    "lvh": Penetrance(0.06, {HYPERTENSION: 0.55}),
    "st_depression": Penetrance(0.05, {CAD: 0.50, SEPSIS: 0.05}),
    "q_wave": Penetrance(0.04, {CAD: 0.40}),
    "peaked_t": Penetrance(0.04, {ARF: 0.40}),
    "cardiomegaly": Penetrance(0.05, {HYPERTENSION: 0.60, AFIB: 0.15}),
    "consolidation": Penetrance(0.04, {PNEUMONIA: 0.85, SEPSIS: 0.15}),
    "effusion": Penetrance(0.05, {ARF: 0.50, PNEUMONIA: 0.20}),
    "edema": Penetrance(0.04, {CAD: 0.40}),
}

LAB_THRESHOLDS: dict[str, tuple[str, float]] = {
    "creatinine_high": ("50912", 1.5),
    "bun_high": ("51006", 28.0),
    "potassium_high": ("50971", 4.8),
    "glucose_high": ("50931", 165.0),
    "wbc_high": ("51301", 12.5),
    "lactate_high": ("50813", 2.5),
    "ck_high": ("50910", 200.0),
    "ast_high": ("50878", 60.0),
    "inr_high": ("51237", 1.5),
    "hemoglobin_low": ("51222", 10.0),
}
"""Finding -> (item id, threshold); `_high` lies above it, `_low` below. A value not measured shows no finding."""


def draw_heart_rate(rng: np.random.Generator, diseases: frozenset[str], afib: bool) -> float:
    """Mean ventricular rate, beats per minute, in 48..150: faster with fibrillation on the ECG, sepsis, pneumonia."""
    rate = rng.normal(74, 10) + 16 * afib
    if SEPSIS in diseases and rng.random() < 0.7:
        rate += 24
    if PNEUMONIA in diseases:
        rate += 8
    return float(np.clip(rate, 48, 150))


def draw_findings(rng: np.random.Generator, diseases: frozenset[str]) -> tuple[dict[str, bool], float]:
    """The findings of ECG and film (in the order of FINDINGS) and the heart rate in beats per minute."""
    drawn = {key: bool(rng.random() < rule.probability(diseases)) for key, rule in PENETRANCE.items()}
    rate_bpm = draw_heart_rate(rng, diseases, drawn["afib"])
    drawn["tachycardia"] = rate_bpm > TACHYCARDIA_BPM
    return {key: drawn[key] for modality in ("ecg", "cxr") for key in FINDINGS[modality]}, rate_bpm


def lab_findings(values: NDArray[np.float64]) -> dict[str, bool]:
    """The findings of raw values [50], NaN where not measured."""
    found = {}
    for key, (item, threshold) in LAB_THRESHOLDS.items():
        value = values[LAB_IDS.index(item)]
        found[key] = bool(value < threshold if key.endswith("_low") else value > threshold)
    return found
