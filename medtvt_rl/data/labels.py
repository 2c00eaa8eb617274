"""The vocabulary of the task: diseases, findings, the phrases that name them, and the way back from a text.

Owns: names, their order and spelling, and `named_findings`. Does not own: which findings a study has (the data), which
phrase a text uses (simulate/texts.py), or the parsing of a whole completion (rewards/answer.py). Importable without
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

DISEASES = (
    "Coronary Artery Disease",
    "Acute Renal Failure",
    "Hypertension",
    "Atrial Fibrillation",
    "Pneumonia",
    "Diabetes Mellitus",
    "Sepsis",
)

SECTIONS = {"ecg": "ECG", "cxr": "CXR", "lab": "LAB"}
"""Modality -> the heading of its section in a reasoning text."""

FINDINGS: dict[str, tuple[str, ...]] = {
    "ecg": ("afib", "tachycardia", "lvh", "st_depression", "q_wave", "peaked_t"),
    "cxr": ("cardiomegaly", "consolidation", "effusion", "edema"),
    "lab": (
        "creatinine_high",
        "bun_high",
        "potassium_high",
        "glucose_high",
        "wbc_high",
        "lactate_high",
        "ck_high",
        "ast_high",
        "inr_high",
        "hemoglobin_low",
    ),
}

ALL_FINDINGS: tuple[str, ...] = tuple(key for keys in FINDINGS.values() for key in keys)

PHRASES: dict[str, tuple[str, ...]] = {
    "afib": ("irregular rhythm without P waves", "irregularly irregular rhythm with absent P waves"),
    "tachycardia": ("fast ventricular rate", "rate above 100"),
    "lvh": ("high left ventricular voltage", "tall precordial voltage of the left ventricle"),
    "st_depression": ("ST segment depression", "depressed ST segments"),
    "q_wave": ("pathological Q waves", "deep Q waves"),
    "peaked_t": ("peaked T waves", "tall narrow T waves"),
    "cardiomegaly": ("enlarged cardiac silhouette", "cardiac silhouette enlarged"),
    "consolidation": ("focal lung consolidation", "a focal airspace opacity"),
    "effusion": ("pleural effusion", "blunted costophrenic angle"),
    "edema": ("perihilar edema", "perihilar haze"),
    "creatinine_high": ("creatinine high",),
    "bun_high": ("urea nitrogen high",),
    "potassium_high": ("potassium high",),
    "glucose_high": ("glucose high",),
    "wbc_high": ("white cells high",),
    "lactate_high": ("lactate high",),
    "ck_high": ("creatine kinase high",),
    "ast_high": ("AST high",),
    "inr_high": ("INR high",),
    "hemoglobin_low": ("hemoglobin low",),
}

NORMAL_PHRASES: dict[str, tuple[str, ...]] = {
    "afib": ("regular sinus rhythm", "regular rhythm with P waves"),
    "cardiomegaly": ("normal heart size", "heart size within limits"),
    "ecg": ("no further abnormality", "otherwise unremarkable"),
    "cxr": ("clear lungs", "lungs are clear"),
    "lab": ("no marked change",),
}
"""What a text says where the finding of that key, or every other finding of that modality, is absent."""

NOT_AVAILABLE = "not available"

_SECTION = re.compile(r"\b(ECG|CXR|LAB)\s*:")
_CLAUSE = re.compile(r"[,.;\n]|\band\b")
_NEGATION = re.compile(r"^\s*(?:no|not|without|absence of|negative for)\b", re.IGNORECASE)
_PATTERNS: dict[str, dict[str, re.Pattern[str]]] = {
    modality: {
        key: re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, PHRASES[key])) + r")(?!\w)", re.IGNORECASE)
        for key in keys
    }
    for modality, keys in FINDINGS.items()
}
_MODALITY = {heading: modality for modality, heading in SECTIONS.items()}


def named_findings(reasoning: str) -> set[str]:
    """The findings that a reasoning text asserts, each counted only in its own modality's section.

    Reads "ECG: ... CXR: ... LAB: ..." in any order and with sections left out; what follows `</think>` is not
    reasoning. A clause that opens with a negation ("no pleural effusion") asserts nothing.
    """
    reasoning = reasoning.split("</think>", 1)[0]
    found: set[str] = set()
    parts = _SECTION.split(reasoning)
    for heading, body in zip(parts[1::2], parts[2::2]):
        patterns = _PATTERNS[_MODALITY[heading]]
        for clause in _CLAUSE.split(body):
            if not _NEGATION.match(clause):
                found.update(key for key, pattern in patterns.items() if pattern.search(clause))
    return found


def answer_text(diseases: Iterable[str]) -> str:
    """The text of an answer, "A; B", in the order of DISEASES. Raises ValueError for a name that isn't one of them."""
    wanted = set(diseases)
    unknown = wanted.difference(DISEASES)
    if unknown:
        raise ValueError(f"diagnoses {sorted(unknown)} are unknown; expected names of {list(DISEASES)}")
    return "; ".join(name for name in DISEASES if name in wanted)
