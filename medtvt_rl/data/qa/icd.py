"""From the billing codes of a hospital stay to the seven diseases.

Owns: which codes count for which disease, and what becomes of codes of other kinds. Does not own: the table that the
codes come from (labels.py).

ICD-10: the exact codes that the paper's published evaluation lists (arXiv 2506.18512; `icd_mapping` in evaluate.py of
github.com/keke-nice/MedTVT-R1), or, where the user asks for it, the families of these codes with all of their subcodes:
E11.22, for one, is not on the paper's list.
ICD-9: the paper maps none; the families below are this project's, the ICD-9-CM counterparts of the same conditions,
and are used only where the user asks for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from medtvt_rl.data.labels import DISEASES

Icd10 = Literal["paper", "families"]


def _codes(stem: str, endings: str) -> list[str]:
    """The codes that begin with `stem` and end in each of the digits."""
    return [stem + ending for ending in endings]


PAPER_ICD10: dict[str, frozenset[str]] = {
    "Coronary Artery Disease": frozenset([*_codes("I25", "0123456789"), "I2510"]),
    "Acute Renal Failure": frozenset(_codes("N17", "01289")),
    "Hypertension": frozenset(
        ["I10", *_codes("I11", "09"), *_codes("I12", "09"), *_codes("I13", "0129"), *_codes("I15", "01289")]
    ),
    "Atrial Fibrillation": frozenset([*_codes("I48", "012349"), *_codes("I489", "012")]),
    "Pneumonia": frozenset(_codes("J18", "01289")),
    "Diabetes Mellitus": frozenset(
        [
            *(code for stem in ("E10", "E11", "E13", "E14", "E19") for code in _codes(stem, "0123456789")),
            *("E1129", "E11319", "E1140", "E1165"),
        ]
    ),
    "Sepsis": frozenset([*_codes("A40", "012389"), *_codes("A41", "01234589"), "R6520", "R6521"]),
}
"""Disease -> its ICD-10-CM codes, without the dot, as published: 114 codes, some of which (I25.1, E11.2, E19.0) are
never billed."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class IcdRules:
    """How codes are read.

    Attributes:
        icd10: the paper's exact codes, or their families.
        icd9: ICD-9 codes count, too.
    """

    icd10: Icd10 = "paper"
    icd9: bool = False

    def named(self, code: str, version: str) -> list[str]:
        """The diseases that a code without its dot names."""
        if version == "10" and self.icd10 == "paper":
            return [name for name, codes in PAPER_ICD10.items() if code in codes]
        families = ICD10 if version == "10" else ICD9
        return [name for name, beginnings in families.items() if code.startswith(beginnings)]


PAPER_RULES = IcdRules()


def diseases_of_stay(
    codes: Iterable[tuple[str, str]], rules: IcdRules, counts: Counter[str]
) -> tuple[tuple[str, ...] | None, str]:
    """The diseases that the codes of one stay name, in the order of DISEASES.

    Args:
        codes: (code, version) pairs; dots and white space are ignored, the version is "9" or "10".
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
        elif version == "9" and not rules.icd9:
            counts["ICD-9 codes left unread"] += 1
            unread_icd9 += 1
        else:
            readable += 1
            named = rules.named(code, version)
            counts[f"ICD-{version} codes of the seven diseases" if named else f"ICD-{version} codes of others"] += 1
            found.update(named)
    if not readable:
        return None, "only ICD-9 codes (see --icd9 map)" if unread_icd9 else "no readable ICD code"
    if unread_icd9:
        counts["stays with codes of both versions"] += 1
    return tuple(name for name in DISEASES if name in found), ""
