"""What a text asserts, denies or only holds possible, in the vocabulary of lexicon.py.

Owns: the scope of negations and hedges within a clause. Does not own: the words (lexicon.py), or whether a text may
say so (validation.py). Machine statements and answers are read by the same rules, so that both mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from medtvt_rl.data.qa.lexicon import CONCEPT_OF_PHRASE, CONCEPTS, DERIVED, LAB_NAMES

_SENTENCE = re.compile(r"[.;\n](?=\s|$)|\n")
_BREAK = re.compile(r",|\band\b|\bbut\b|\bwith\b|\bwhich\b|\bwhile\b|\s-+\s", re.IGNORECASE)
_LISTED = re.compile(
    r"\b(?:no|without|negative for|free of)\b(?:[^,.;\n]{1,40},)+\s*(?:or|nor)\b[^,.;\n]*", re.IGNORECASE
)
_NO = re.compile(
    r"\b(?:no|not|without|absence of|absent|negative for|free of|neither|nor|denies|rules? out|ruled out|lacks?|"
    r"excludes?)\b",
    re.IGNORECASE,
)
_MAYBE = re.compile(
    r"\b(?:possibl[ey]|probabl[ey]|consider|may|might|could|suspected|suspicious|suggest\w*|questionable|likely|"
    r"borderline|cannot (?:exclude|rule out)|cannot be (?:excluded|ruled out)|uncertain|equivocal)\b",
    re.IGNORECASE,
)
_MAYBE_AFTER = re.compile(
    r"\b(?:cannot be (?:excluded|ruled out)|(?:is|are) (?:possible|uncertain|equivocal|questionable))", re.IGNORECASE
)
_NO_AFTER = re.compile(
    r"\b(?:is|are|was|were) (?:absent|not (?:seen|present|identified|evident|observed|elevated))", re.IGNORECASE
)
_HIGH = r"high(?:er)?|elevat\w+|rais\w+|increas\w+|above|prolonged|supranormal"
_LOW = r"low(?:er)?|decreas\w+|reduc\w+|below|diminished|depressed"
_NORMAL = r"normal|within|unremarkable"


def _either(words: dict[str, str]) -> tuple[re.Pattern[str], list[str]]:
    """One pattern for all, each in a group of its own number."""
    groups = "|".join(f"({piece})" for piece in words.values())
    return re.compile(rf"(?<![\w-])(?:{groups})(?!\w)", re.IGNORECASE), list(words)


_CONCEPT, _CONCEPT_NAMES = _either(CONCEPTS)
_DERIVED, _DERIVED_NAMES = _either(DERIVED)
_LAB, _LAB_ITEMS = _either(dict(sorted(LAB_NAMES.items(), key=lambda pair: -len(pair[1]))))
_LEVEL, _LEVELS = _either({"high": _HIGH, "low": _LOW, "normal": _NORMAL})


@dataclass(slots=True)
class Mentions:
    """Concepts of a text: names of CONCEPTS, and deviations such as "50912 high" or "50912 normal"."""

    asserted: set[str] = field(default_factory=set)
    possible: set[str] = field(default_factory=set)
    denied: set[str] = field(default_factory=set)

    @property
    def named(self) -> set[str]:
        """Asserted or held possible."""
        return self.asserted | self.possible


_PHRASE = re.compile(
    rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, CONCEPT_OF_PHRASE), key=len, reverse=True))})(?!\w)", re.IGNORECASE
)


def mentions(text: str) -> Mentions:
    """What a text says. "No A, B or C" denies all three; else a negation or a hedge reaches to the end of its clause.

    A laboratory item without a level takes that of the next clause of its sentence ("sodium and chloride are normal"),
    else that of the last one before ("elevated urea nitrogen, creatinine").
    """
    found = Mentions()
    for sentence in _SENTENCE.split(text):
        sentence = without_phrases(sentence)
        for match in _LISTED.finditer(sentence):
            found.denied.update(name for name, _ in _named(match[0])[0])
        waiting: list[str] = []
        last_level = ""
        for clause in _BREAK.split(_LISTED.sub(",", sentence)):
            named, items, level = _named(clause)
            _sort_in(clause, named, found)
            if level:
                found.asserted.update(f"{item} {level}" for item in waiting)
                waiting, last_level = [], level
            waiting += items
        if last_level:
            found.asserted.update(f"{item} {last_level}" for item in waiting)
    return found


def without_phrases(text: str) -> str:
    """A text with the phrases of data/labels.py replaced by their concepts.

    They may hold words such as "without", or a number, and stand for their concept as a whole.
    """
    return _PHRASE.sub(lambda match: CONCEPT_OF_PHRASE[match[0].lower()], text)


def _sort_in(clause: str, named: list[tuple[str, int]], found: Mentions) -> None:
    maybe, no = _MAYBE.search(clause), _NO.search(clause)
    if maybe is not None and no is not None and maybe.start() <= no.start():
        no = None  # "cannot rule out", "may not be": a doubt, not a denial
    for name, end in named:
        if _MAYBE_AFTER.search(clause) or (maybe is not None and maybe.start() < end):
            found.possible.add(name)
        elif _NO_AFTER.search(clause) or (no is not None and no.start() < end):
            found.denied.add(name)
        else:
            found.asserted.add(name)


def _named(clause: str) -> tuple[list[tuple[str, int]], list[str], str]:
    """(concept, where it ends) of all that a clause names; items without a level; the first level, or ""."""
    named = [(_CONCEPT_NAMES[_group(match)], match.end()) for match in _CONCEPT.finditer(clause)]
    named += [(_DERIVED_NAMES[_group(match)], match.end()) for match in _DERIVED.finditer(clause)]
    levels = [(_LEVELS[_group(match)], match) for match in _LEVEL.finditer(clause)]
    items = [(_LAB_ITEMS[_group(match)], match) for match in _LAB.finditer(clause)]
    if not levels:
        return named, [item for item, _ in items], ""
    for item, match in items:
        level, near = min(levels, key=lambda pair: _gap(pair[1], match))
        named.append((f"{item} {level}", max(match.end(), near.end())))
    return named, [], levels[0][0]


def _group(match: re.Match[str]) -> int:
    return (match.lastindex or 1) - 1


def _gap(first: re.Match[str], second: re.Match[str]) -> int:
    return max(first.start() - second.end(), second.start() - first.end(), 0)
