"""Writes the texts of simulated studies: explanations, chains of evidence, questions.

Owns: templates and questions. Does not own: phrases (labels.py). A text names only what was rendered or measured; a
modality that is missing is said to be so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from medtvt_rl.data.labels import FINDINGS, NORMAL_PHRASES, NOT_AVAILABLE, PHRASES, SECTIONS, answer_text

QUESTIONS: dict[str, tuple[str, ...]] = {
    "ecg": ("Explain the ECG.", "Describe the ECG."),
    "cxr": ("Explain the chest X-ray.", "Describe the chest X-ray."),
    "lab": ("Explain the laboratory values.", "Describe the laboratory values."),
    "diagnosis": ("Reason over ECG, chest X-ray and laboratory values, then list the diagnoses.",),
}


def _choose(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def question(rng: np.random.Generator, kind: str) -> str:
    """One of the questions of that kind: ecg, cxr, lab or diagnosis."""
    return _choose(rng, QUESTIONS[kind])


def section(rng: np.random.Generator, modality: str, findings: Mapping[str, bool] | None) -> str:
    """What one modality shows, "ECG: ... ." `findings` holds every finding of the modality; None: it was not taken."""
    if findings is None:
        return section_text(modality, None)
    keys = FINDINGS[modality]
    parts = []
    if keys[0] in NORMAL_PHRASES:
        parts.append(_choose(rng, PHRASES[keys[0]] if findings[keys[0]] else NORMAL_PHRASES[keys[0]]))
        keys = keys[1:]
        parts += [_choose(rng, PHRASES[key]) for key in keys if findings[key]]
        if len(parts) == 1:
            parts.append(_choose(rng, NORMAL_PHRASES[modality]))
    else:
        parts = [_choose(rng, PHRASES[key]) for key in keys if findings[key]]
        parts = parts or [_choose(rng, NORMAL_PHRASES[modality])]
    return section_text(modality, parts)


def section_text(modality: str, parts: Sequence[str] | None) -> str:
    """One section from its phrases, "ECG: A, B."; None: the modality was not taken."""
    return f"{SECTIONS[modality]}: {NOT_AVAILABLE if parts is None else ', '.join(parts)}."


def chain_of_evidence(
    rng: np.random.Generator, findings: Mapping[str, Mapping[str, bool] | None], diseases: Collection[str]
) -> str:
    """The whole answer: evidence by modality in <think>, diagnoses in <answer>."""
    return chain_text((section(rng, modality, findings[modality]) for modality in SECTIONS), diseases)


def chain_text(sections: Iterable[str], diseases: Collection[str]) -> str:
    """The whole answer from its sections and the diagnoses."""
    return f"<think> {' '.join(sections)} </think><answer> {answer_text(diseases)} </answer>"
