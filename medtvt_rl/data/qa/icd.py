"""From the billing codes of a hospital stay to the seven diseases.

Owns: which codes count for which disease, and what becomes of codes of other kinds. Does not own: the table that the
codes come from (labels.py).

ICD-10: the families of the codes that the paper's published evaluation lists (arXiv 2506.18512). The paper takes exact
codes; here a family counts with all of its subcodes (E11.22, for one, is not on the paper's list).
ICD-9: the paper maps none; the families below are this project's, the ICD-9-CM counterparts of the same conditions,
and are used only where the user asks for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from medtvt_rl.data.labels import DISEASES

ICD10: dict[str, tuple[str, ...]] = {
    "Coronary Artery Disease": ("I25",),
    "Acute Renal Failure": ("N17",),
    "Hypertension": ("I10", "I11", "I12", "I13", "I15"),
    "Atrial Fibrillation": ("I48",),
    "Pneumonia": ("J18",),
    "Diabetes Mellitus": ("E10", "E11", "E13", "E14"),
    "Sepsis": ("A40", "A41", "R652"),
}
"""Disease -> how its ICD-10-CM codes begin, without the dot."""

ICD9: dict[str, tuple[str, ...]] = {
    "Coronary Artery Disease": ("412", "414"),
    "Acute Renal Failure": ("584",),
    "Hypertension": ("401", "402", "403", "404", "405"),
    "Atrial Fibrillation": ("4273",),
    "Pneumonia": ("485", "486"),
    "Diabetes Mellitus": ("250",),
    "Sepsis": ("038", "78552", "99591", "99592"),
}
"""Disease -> how its ICD-9-CM codes begin, without the dot."""

_FORM = {"10": re.compile(r"[A-Z]\d[0-9A-Z]{1,5}"), "9": re.compile(r"(?:\d{3}|V\d\d|E\d{3})\d{0,2}")}


def diseases_of_stay(
    codes: Iterable[tuple[str, str]], with_icd9: bool, counts: Counter[str]
) -> tuple[tuple[str, ...] | None, str]:
    """The diseases that the codes of one stay name, in the order of DISEASES.

    Args:
        codes: (code, version) pairs; dots and white space are ignored, the version is "9" or "10".
        with_icd9: ICD-9 codes count, too.
        counts: gains how many codes there were of each kind.

    Returns:
        The diseases and "", or None and the reason why they are unknown: then the stay has no code that could be read.
    """
    found: set[str] = set()
    readable = unread_icd9 = 0
    for code, version in codes:
        code, version = code.replace(".", "").strip().upper(), version.strip()
        form = _FORM.get(version)
        if form is None:
            counts["codes of an unknown ICD version"] += 1
        elif form.fullmatch(code) is None:
            counts[f"ICD-{version} codes that cannot be read"] += 1
        elif version == "9" and not with_icd9:
            counts["ICD-9 codes left unread"] += 1
            unread_icd9 += 1
        else:
            readable += 1
            families = ICD10 if version == "10" else ICD9
            named = [name for name, beginnings in families.items() if code.startswith(beginnings)]
            counts[f"ICD-{version} codes of the seven diseases" if named else f"ICD-{version} codes of others"] += 1
            found.update(named)
    if not readable:
        return None, "only ICD-9 codes (see --icd9 map)" if unread_icd9 else "no readable ICD code"
    if unread_icd9:
        counts["stays with codes of both versions"] += 1
    return tuple(name for name in DISEASES if name in found), ""
