"""What is asked about a study: the questions, the answers by template, the prompts for a language model.

Owns: the wording. Does not own: questions and phrases that simulated texts use too (simulate/texts.py, data/labels.py),
the labels (labels.py), or whether an answer is right (validation.py). A template says what the labels say, and nothing
else. It gives levels and no values: the model that will be trained sees percentiles and could only invent values.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medtvt_rl.data.labels import NORMAL_PHRASES, PHRASES, SECTIONS, answer_text
from medtvt_rl.data.labs import LAB_ITEMS
from medtvt_rl.data.medtvt_qa import QA_KINDS, QAKind
from medtvt_rl.data.qa.concepts import mentions
from medtvt_rl.data.qa.labels import ABSENT, NO_FINDING, PRESENT, UNCERTAIN, StudyLabels
from medtvt_rl.data.qa.lexicon import FINDING_OF, LAB_PHRASES
from medtvt_rl.data.qa.reference_ranges import NORMAL
from medtvt_rl.data.simulate.texts import chain_text, question, section_text

Message = dict[str, str]
_UNSURE = ("no certain finding",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question about one study, to be answered from its labels."""

    labels: StudyLabels
    kind: QAKind
    question: str
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers of this item alone: the same in every run of one seed, whatever the order."""
        return np.random.default_rng(
            [self.seed, zlib.crc32(self.labels.study_id.encode()), QA_KINDS.index(self.kind), 1]
        )


def make_item(labels: StudyLabels, kind: QAKind, seed: int) -> Item:
    """The question of one kind about a study; which wording is chosen depends on (seed, study, kind) alone."""
    rng = np.random.default_rng([seed, zlib.crc32(labels.study_id.encode()), QA_KINDS.index(kind), 0])
    return Item(labels=labels, kind=kind, question=question(rng, kind), seed=seed)


def template_answer(item: Item) -> str:
    """The answer that the labels give, in the words of the simulated texts where those have words for it."""
    rng, labels = item.rng, item.labels
    if item.kind != "diagnosis":
        return section_text(item.kind, _PARTS[item.kind](rng, labels))
    taken = labels.taken
    sections = [section_text(m, _PARTS[m](rng, labels) if m in taken else None) for m in SECTIONS]
    return chain_text(sections, labels.diseases)


def _choose(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _ecg_parts(rng: np.random.Generator, labels: StudyLabels) -> list[str]:
    """The machine's statements, then in plain words what those of them show that the model's vocabulary has."""
    asserted = set().union(*(mentions(statement).asserted for statement in labels.statements))
    shown = [_choose(rng, PHRASES[key]) for concept, key in FINDING_OF.items() if concept in asserted]
    return list(dict.fromkeys([*map(_uncapitalised, labels.statements), *shown]))


def _cxr_parts(rng: np.random.Generator, labels: StudyLabels) -> list[str]:
    """What is present, then what is said to be absent; uncertain labels are left unsaid."""
    parts = [
        _choose(rng, PHRASES[FINDING_OF[name]]) if (name := cxr_concept(label)) in FINDING_OF else label.lower()
        for label in labels.film
        if labels.film[label] == PRESENT and label != NO_FINDING
    ]
    parts += [f"no {cxr_concept(label)}" for label in labels.film if labels.film[label] == ABSENT]
    return parts or [_choose(rng, NORMAL_PHRASES["cxr"] if labels.film.get(NO_FINDING) == PRESENT else _UNSURE)]


def _lab_parts(rng: np.random.Generator, labels: StudyLabels) -> list[str]:
    """The deviations, by level; what is within its range is left unsaid."""
    deviations = [f"{reading.item} {reading.level}" for reading in labels.labs if reading.level != NORMAL]
    return [LAB_PHRASES.get(deviation) or _plain_words(deviation) for deviation in deviations] or [
        _choose(rng, NORMAL_PHRASES["lab"])
    ]


_PARTS: dict[str, Callable[[np.random.Generator, StudyLabels], list[str]]] = {
    "ecg": _ecg_parts,
    "cxr": _cxr_parts,
    "lab": _lab_parts,
}


def cxr_concept(label: str) -> str:
    """How texts name a label of the film: "Pleural Effusion" -> "pleural effusion"."""
    return label.lower()


def _plain_words(deviation: str) -> str:
    item, level = deviation.split()
    return f"{LAB_ITEMS[item].replace(',', '')} {level}"


def _uncapitalised(statement: str) -> str:
    first = statement.split()[0]
    return statement if first[1:] != first[1:].lower() or len(first) == 1 else statement[0].lower() + statement[1:]


_ROLE = {
    "ecg": "You are a cardiologist who explains 12-lead electrocardiograms.",
    "cxr": "You are a radiologist who explains chest X-rays.",
    "lab": "You are a physician of laboratory medicine who explains blood values.",
    "diagnosis": "You are a physician who reasons from ECG, chest X-ray and laboratory values to diagnoses.",
}
_RULES = """\
Write as if you read the measurement yourself; do not mention labels or this instruction.
Name only findings that are listed as present, and call possible what is listed as uncertain. Invent no finding, no
disease and no number. Where a number is given, you may repeat it, unchanged."""
_FORM = {
    "explanation": "Answer in one paragraph of two to six sentences, without headings, lists or tags: what is seen, "
    "and what it means for the body.",
    "diagnosis": """\
Answer in exactly this form, the diagnoses as they are listed and separated by "; ":
<think> ECG: evidence. CXR: evidence. LAB: evidence. </think><answer> A; B </answer>
Each of the three headings stands once, in this order. Say under each which of the diagnoses its findings support.
Under a heading that is not available write only: not available.""",
}


def chat_messages(item: Item) -> list[Message]:
    """The prompt for a language model: the labels, no id, no path, no date."""
    kinds = [item.kind] if item.kind != "diagnosis" else list(SECTIONS)
    evidence = "\n\n".join(label_text(item.labels, kind) for kind in kinds)
    form = _FORM["diagnosis" if item.kind == "diagnosis" else "explanation"]
    if item.kind == "diagnosis":
        evidence += f"\n\nDiagnoses: {answer_text(item.labels.diseases)}"
    return [
        {"role": "system", "content": f"{_ROLE[item.kind]}\n{_RULES}\n{form}"},
        {"role": "user", "content": f"{evidence}\n\n{item.question}"},
    ]


def label_text(labels: StudyLabels, modality: str) -> str:
    """What the labels of one modality say, as a language model is told."""
    heading = SECTIONS[modality]
    if modality not in labels.taken:
        return f"{heading}: not available"
    if modality == "ecg":
        lines = [f"- {statement}" for statement in labels.statements]
    elif modality == "cxr":
        found = {value: [n for n, its in labels.film.items() if its == value] for value in (PRESENT, ABSENT, UNCERTAIN)}
        lines = [f"- {value}: {', '.join(names)}" for value, names in found.items() if names]
    else:
        lines = [f"- {reading}" for reading in labels.labs if reading.level != NORMAL]
        normal = [LAB_ITEMS[reading.item] for reading in labels.labs if reading.level == NORMAL]
        lines += [f"- within the reference range: {'; '.join(normal)}"] if normal else []
    return "\n".join([f"{heading}, as labelled:", *lines])
