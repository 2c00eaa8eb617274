"""Reading a completion: its reasoning, the names in its answer, and when two names mean the same disease.

Owns: the format `<think> reasoning </think><answer> A; B </answer>`, shared by rewards and evaluation, so that both
judge the same text alike. Does not own: what a reward or a metric makes of it, the other names of a disease
(synonyms.py), or the list of diseases (data/labels.py).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from medtvt_rl.rewards.synonyms import standing_for

_COMPLETION = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_NO_LETTER = re.compile(r"[\W_]+")
_BEHIND = re.compile(r"(?P<name>[^()]*)\((?P<inside>[^()]*)\)\s*\.?\s*")
_LIGATURES = str.maketrans({"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"})

NOTHING = frozenset({"none", "nil", "n a", "no diagnosis", "no diagnoses", "no disease", "no diseases"})
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
    # Counted first: with tags repeated a thousand times the pattern alone would try every pair of them.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return None
    match = _COMPLETION.fullmatch(text)
    if match is None:
        return None
    return ParsedAnswer(reasoning=match["reasoning"].strip(), names=split_names(match["answer"]))


def parsed_reward(completion: str, ground_truth: str = "") -> float:
    """1 if `parse_answer` can read the completion, else 0; with weight 0 it changes no reward, and its mean is the
    parse rate of every step. The ground truth is not looked at."""
    return 0.0 if parse_answer(completion) is None else 1.0


def first_answer(text: str) -> str | None:
    """What stands between the first `<answer>` and the next `</answer>`, whatever surrounds them; None without both.

    As the published implementation (https://arxiv.org/abs/2506.18512) finds an answer.
    """
    _, _, behind = text.partition("<answer>")
    inside, closing, _ = behind.partition("</answer>")
    return inside if closing else None


def split_names(answer: str) -> tuple[str, ...]:
    """The names of "A; B", stripped, blanks left out, in their order."""
    return tuple(name for part in answer.split(";") if (name := part.strip()))


def normalise(name: str) -> str:
    """A name without case, white space, punctuation or accents, synonyms replaced; "" if nothing is left.

    Characters that are not seen (zero-width spaces, soft hyphens) do not count. An abbreviation in brackets behind
    a name, "Coronary Artery Disease (CAD)", is left out where both stand for the same; other brackets are words.
    """
    behind = _BEHIND.fullmatch(name)
    if behind is not None:
        outside, inside = (standing_for(_words(behind[part])) for part in ("name", "inside"))
        if outside == inside:
            return outside
    return standing_for(_words(name))


def normalised_names(names: tuple[str, ...]) -> frozenset[str]:
    """The set of normalised names, without blanks and without the words for "nothing".

    A semicolon of another script (full-width, Greek) separates, too.
    """
    parts = (part for name in names for part in _by_character("NFKC", name).split(";"))
    return frozenset(normal for part in parts if (normal := normalise(part)) and normal not in NOTHING)


def _words(text: str) -> str:
    """Lower-case letters and digits, one space between words."""
    decomposed = _by_character("NFKD", text.translate(_LIGATURES))
    seen = "".join(c for c in decomposed if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    return _NO_LETTER.sub(" ", seen.casefold()).strip()


def _by_character(form: Literal["NFKC", "NFKD"], text: str) -> str:
    """Each character normalised alone: putting a long run of accents in order takes the square of its length."""
    return "".join(unicodedata.normalize(form, character) for character in text)
