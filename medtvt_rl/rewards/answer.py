"""Reading a completion: its reasoning, the names in its answer, and when two names mean the same disease.

Owns: the format `<think> reasoning </think><answer> A; B </answer>`, shared by rewards and evaluation, so that both
judge the same text alike. Does not own: what a reward or a metric makes of it, or the list of diseases
(data/labels.py).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_COMPLETION = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_NO_LETTER = re.compile(r"[\W_]+")

SYNONYMS: dict[str, str] = {
    "cad": "coronary artery disease",
    "coronary heart disease": "coronary artery disease",
    "coronary disease": "coronary artery disease",
    "coronary atherosclerosis": "coronary artery disease",
    "ischemic heart disease": "coronary artery disease",
    "ischaemic heart disease": "coronary artery disease",
    "arf": "acute renal failure",
    "aki": "acute renal failure",
    "acute kidney injury": "acute renal failure",
    "acute kidney failure": "acute renal failure",
    "htn": "hypertension",
    "high blood pressure": "hypertension",
    "arterial hypertension": "hypertension",
    "essential hypertension": "hypertension",
    "af": "atrial fibrillation",
    "afib": "atrial fibrillation",
    "a fib": "atrial fibrillation",
    "auricular fibrillation": "atrial fibrillation",
    "pna": "pneumonia",
    "dm": "diabetes mellitus",
    "diabetes": "diabetes mellitus",
    "type 1 diabetes": "diabetes mellitus",
    "type 2 diabetes": "diabetes mellitus",
    "type 1 diabetes mellitus": "diabetes mellitus",
    "type 2 diabetes mellitus": "diabetes mellitus",
    "diabetes mellitus type 1": "diabetes mellitus",
    "diabetes mellitus type 2": "diabetes mellitus",
    "septicemia": "sepsis",
    "septicaemia": "sepsis",
}
"""Normalised name -> the normalised name that it stands for. Names of other conditions stand for themselves."""

NOTHING = frozenset({"none", "no diagnosis"})
"""Normalised names that say that there is nothing to name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAnswer:
    """A completion that keeps the format.

    Attributes:
        reasoning: the text between the think tags, stripped.
        names: as written, stripped, blanks left out, in their order.
    """

    reasoning: str
    names: tuple[str, ...]

    @property
    def normalised(self) -> frozenset[str]:
        """The set of names, normalised."""
        return normalised_names(self.names)


def parse_answer(text: str) -> ParsedAnswer | None:
    """Reads `<think>..</think><answer>A; B</answer>` strictly.

    White space is allowed around and between the two parts, and nothing else; each tag occurs once, in lower case.

    Returns:
        None for a completion that breaks the format.
    """
    match = _COMPLETION.fullmatch(text)
    if match is None or _TAG.search(match["reasoning"]) or _TAG.search(match["answer"]):
        return None
    return ParsedAnswer(reasoning=match["reasoning"].strip(), names=split_names(match["answer"]))


def split_names(answer: str) -> tuple[str, ...]:
    """The names of "A; B", stripped, blanks left out, in their order."""
    return tuple(name for part in answer.split(";") if (name := part.strip()))


def normalise(name: str) -> str:
    """A name without case, white space, punctuation or accents, synonyms replaced; "" if nothing is left."""
    decomposed = unicodedata.normalize("NFKD", name)
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    words = _NO_LETTER.sub(" ", plain.casefold()).strip()
    return SYNONYMS.get(words, words)


def normalised_names(names: tuple[str, ...]) -> frozenset[str]:
    """The set of normalised names, without blanks and without the words for "nothing"."""
    return frozenset(normal for name in names if (normal := normalise(name)) and normal not in NOTHING)
