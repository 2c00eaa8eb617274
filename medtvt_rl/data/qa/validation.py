"""Whether an answer says what the labels say: its form, its diagnoses, the findings and numbers that it names.

Owns: the checks and the words of a refusal. Does not own: the vocabulary (lexicon.py) or how a clause is read
(concepts.py). What lies outside the vocabulary cannot be checked; docs/build-qa.md says so.
"""

from __future__ import annotations

import re

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import NOT_AVAILABLE, SECTIONS
from medtvt_rl.data.labs import LAB_ITEMS
from medtvt_rl.data.medtvt_qa import parse_diagnoses
from medtvt_rl.data.qa.concepts import Mentions, mentions, without_phrases
from medtvt_rl.data.qa.labels import ABSENT, NO_FINDING, PRESENT, UNCERTAIN, StudyLabels
from medtvt_rl.data.qa.lexicon import disease_concept
from medtvt_rl.data.qa.reference_ranges import NORMAL
from medtvt_rl.data.qa.templates import Item, cxr_concept, label_text
from medtvt_rl.rewards.answer import parse_answer

MAX_CHARACTERS = 6000
_HEADING = re.compile(rf"\b({'|'.join(SECTIONS.values())})\s*:")
_TAG = re.compile(r"</?\s*(?:think|answer|ecg|cxr|labs?|image)\b[^>]*>|<\|", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
_TWELVE_LEADS = re.compile(r"\b12[- ]lead", re.IGNORECASE)
_ALL_WELL = re.compile(
    r"\b(?:unremarkable|no abnormalit(?:y|ies)|(?:entirely|completely) normal|normal (?:ECG|electrocardiogram|chest|"
    r"film|study)|within normal limits|all values (?:are )?normal)\b",
    re.IGNORECASE,
)


def refusal(item: Item, answer: str) -> str | None:
    """Why an answer cannot be taken, in one line; None for one that can."""
    if not answer.strip():
        return "the answer is empty"
    if len(answer) > MAX_CHARACTERS:
        return f"the answer has {len(answer)} characters, at most {MAX_CHARACTERS} are taken"
    if item.kind == "diagnosis":
        return _chain_refusal(item.labels, answer)
    if _TAG.search(answer):
        return "the explanation holds a tag"
    return _text_refusal(item.labels, item.kind, answer, diseases=False)


def _chain_refusal(labels: StudyLabels, answer: str) -> str | None:
    parsed = parse_answer(answer)
    if parsed is None:
        return "the form is not <think> ... </think><answer> A; B </answer>"
    if _TAG.search(parsed.reasoning):
        return "the reasoning holds a tag"
    try:
        named = parse_diagnoses(answer.strip())
    except DataError as error:
        return str(error).split("; ")[0].removeprefix("messages: ")
    if named != labels.diseases:
        return f"the diagnoses are {'; '.join(named)}, the labels say {'; '.join(labels.diseases)}"
    parts = _HEADING.split(parsed.reasoning)
    if parts[1::2] != list(SECTIONS.values()):
        return (
            f"the headings are {', '.join(parts[1::2]) or 'none'}, expected {', '.join(SECTIONS.values())}, each once"
        )
    if parts[0].strip():
        return "the reasoning does not begin with ECG:"
    for modality, body in zip(SECTIONS, parts[2::2]):
        if modality not in labels.taken:
            if body.strip(" .\n") != NOT_AVAILABLE:
                return f"{SECTIONS[modality]} was not taken, and more is said than {NOT_AVAILABLE!r}"
            continue
        reason = _text_refusal(labels, modality, body, diseases=True)
        if reason is not None:
            return f"under {SECTIONS[modality]}: {reason}"
    return None


def _text_refusal(labels: StudyLabels, modality: str, text: str, diseases: bool) -> str | None:
    """Of what is said of one modality; `diseases`: those of the study may be named, too."""
    if not text.strip(" .\n"):
        return "nothing is said"
    known, said = label_concepts(labels, modality), mentions(text)
    own = {disease_concept(name) for name in labels.diseases} if diseases else set()
    deviating = {name for name in known.asserted if not name.endswith(f" {NORMAL}")} - {"sinus rhythm"}
    invented = sorted(said.named - known.named - own)
    if invented:
        return f"{_title(invented[0])} is named, the labels do not have it"
    overstated = sorted((said.asserted & known.possible) - own)
    if overstated:
        return f"{_title(overstated[0])} is asserted, the labels hold it only possible"
    denied = sorted(said.denied & known.asserted)
    if denied:
        return f"{_title(denied[0])} is denied, the labels have it"
    source = label_text(labels, modality)
    if deviating and any(match[0].lower() not in source.lower() for match in _ALL_WELL.finditer(text)):
        return f"all is called normal, the labels have {_title(min(deviating))}"
    if deviating and not said.named & deviating:
        return f"no finding of the labels is named, such as {_title(min(deviating))}"
    strange = sorted(_numbers(_TWELVE_LEADS.sub("", without_phrases(text))) - _numbers(source))
    return f"the number {strange[0]:g} is not among the labels" if strange else None


def label_concepts(labels: StudyLabels, modality: str) -> Mentions:
    """What the labels of one modality assert, hold possible and deny, in the vocabulary of answers."""
    found = Mentions()
    if modality == "ecg":
        for statement in labels.statements:
            own = mentions(statement)
            found.asserted |= own.asserted
            found.possible |= own.possible
            found.denied |= own.denied
    elif modality == "cxr":
        by_value = {PRESENT: found.asserted, UNCERTAIN: found.possible, ABSENT: found.denied}
        for label, value in labels.film.items():
            if label != NO_FINDING:
                by_value[value].add(cxr_concept(label))
    else:
        found.asserted |= {f"{reading.item} {reading.level}" for reading in labels.labs}
    found.possible -= found.asserted
    return found


def _numbers(text: str) -> set[float]:
    return {float(match[0].replace(",", "").replace("−", "-")) for match in _NUMBER.finditer(text)}


def _title(concept: str) -> str:
    item, _, level = concept.partition(" ")
    return f"{LAB_ITEMS[item]} {level}" if item in LAB_ITEMS else concept
