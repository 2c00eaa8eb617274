"""Other names of the seven diseases.

Owns: the table, in normalised form, and the look-up of spellings that differ by spaces, dots or a plural. Does not own:
normalisation itself (answer.py) or the list of diseases (data/labels.py).

A name is in the table only if it names one of the diseases, or a kind of it that the published mapping from ICD-10
counts as the disease (I25, N17, I10, I48, J18, E10-E14, A40, A41, R65.2). Names that are less ("renal failure") or
other ("atrial flutter") stand for themselves.
"""

from __future__ import annotations

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "coronary artery disease": (
        "cad",
        "coronary disease",
        "coronary heart disease",
        "coronary atherosclerosis",
        "coronary arteriosclerosis",
        "coronary artery atherosclerosis",
        "atherosclerotic coronary artery disease",
        "atherosclerotic heart disease",
        "atherosclerotic heart disease of native coronary artery",
        "atherosclerotic heart disease of native coronary artery without angina pectoris",
        "ashd",
        "ihd",
        "ischemic heart disease",
        "ischaemic heart disease",
        "chronic ischemic heart disease",
        "chronic ischaemic heart disease",
    ),
    "acute renal failure": (
        "arf",
        "aki",
        "acute kidney injury",
        "acute kidney failure",
        "acute kidney failure unspecified",
        "acute renal injury",
        "acute renal insufficiency",
        "acute kidney insufficiency",
    ),
    "hypertension": (
        "htn",
        "high blood pressure",
        "arterial hypertension",
        "systemic hypertension",
        "systemic arterial hypertension",
        "essential hypertension",
        "primary hypertension",
        "essential primary hypertension",
        "hypertensive disease",
    ),
    "atrial fibrillation": (
        "af",
        "afib",
        "a fibrillation",
        "auricular fibrillation",
        "unspecified atrial fibrillation",
        "paroxysmal atrial fibrillation",
        "persistent atrial fibrillation",
        "permanent atrial fibrillation",
        "chronic atrial fibrillation",
        "paroxysmal af",
        "paroxysmal afib",
        "persistent af",
        "permanent af",
        "chronic af",
        "paf",
    ),
    "pneumonia": (
        "pna",
        "pneumonia unspecified organism",
        "lobar pneumonia",
        "bronchopneumonia",
        "community acquired pneumonia",
    ),
    "diabetes mellitus": ("dm", "diabetes", "iddm", "niddm", "t1d", "t2d", "t1dm", "t2dm"),
    "sepsis": (
        "septicemia",
        "septicaemia",
        "sepsis unspecified organism",
        "severe sepsis",
        "septic shock",
        "blood poisoning",
    ),
}
_TYPED_DIABETES = [
    form.format(name=name, number=number)
    for name in ("diabetes mellitus", "diabetes", "dm")
    for number in ("1", "2", "i", "ii", "one", "two")
    for form in (
        "type {number} {name}",
        "{name} type {number}",
        "{name} {number}",
        "type {number} {name} without complications",
        "{name} type {number} without complications",
    )
]

SYNONYMS: dict[str, str] = {
    **{other: name for name, others in _OTHER_NAMES.items() for other in others},
    **dict.fromkeys(_TYPED_DIABETES, "diabetes mellitus"),
}
"""Normalised name -> the normalised name that it stands for. Names of other conditions stand for themselves."""

# "a fib", "a.f." and "C.A.D." are "afib", "af" and "cad" without the spaces that dots and strokes became.
_TOGETHER = {key.replace(" ", ""): name for name in _OTHER_NAMES for key in (name, *_OTHER_NAMES[name])} | {
    key.replace(" ", ""): "diabetes mellitus" for key in _TYPED_DIABETES
}


def standing_for(words: str) -> str:
    """The name that normalised `words` stand for: themselves, if they are no other name of a disease.

    Spaces do not count, and neither does a plural: "a fib" is "afib", "pneumonias" is "pneumonia".
    """
    together = words.replace(" ", "")
    found = _TOGETHER.get(together)
    if found is None and together.endswith("s"):
        found = _TOGETHER.get(together[:-1])
    return words if found is None else found
