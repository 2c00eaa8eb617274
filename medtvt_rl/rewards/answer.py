"""Reading a completion: its reasoning, the names in its answer, and when two names mean the same disease.

Owns: the format `<think> reasoning </think><answer> A; B </answer>`, shared by rewards and evaluation, so that both
judge the same text alike. Does not own: what a reward or a metric makes of it, or the list of diseases
(data/labels.py).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import islice

_TAG = re.compile(r"</?(?:think|answer)>")
_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
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
    tags = list(islice(_TAG.finditer(text), len(_TAGS) + 1))
    if [tag[0] for tag in tags] != _TAGS:
        return None
    ends = [0, *(place for tag in tags for place in tag.span()), len(text)]
    before, reasoning, between, answer, after = (text[a:b] for a, b in zip(ends[::2], ends[1::2]))
    if (before + between + after).strip():
        return None
    return ParsedAnswer(reasoning=reasoning.strip(), names=split_names(answer))


def tagged_answer(text: str) -> str | None:
    """What lies between the first answer tag and the next one that closes it; None where there is no such pair."""
    _, opened, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer if opened and closed else None


def split_names(answer: str) -> tuple[str, ...]:
    """The names of "A; B", stripped, blanks left out, in their order."""
    return tuple(name for part in answer.split(";") if (name := part.strip()))


def normalise(name: str) -> str:
    """A name without case, white space, punctuation or accents, synonyms replaced; "" if nothing is left."""
    # Character by character: a long run of accents takes the square of its length to be put in order.
    decomposed = (part for character in name for part in unicodedata.normalize("NFKD", character))
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    words = _NO_LETTER.sub(" ", plain.casefold()).strip()
    return SYNONYMS.get(words, words)


def normalised_names(names: tuple[str, ...]) -> frozenset[str]:
    """The set of normalised names, without blanks and without the words for "nothing"."""
    return frozenset(normal for name in names if (normal := normalise(name)) and normal not in NOTHING)
