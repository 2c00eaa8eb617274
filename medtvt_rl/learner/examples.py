"""Supervised examples of an epoch: questions and answers as token ids, with modalities withheld at random.

Owns: which modalities an example goes without, and what its answer then says. Does not own: the questions and answers
(the study store), the wording of prompts (data/task.py), batching (supervised.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.labels import NOT_AVAILABLE, SECTIONS
from medtvt_rl.data.medtvt_qa import QAExample
from medtvt_rl.data.task import without
from medtvt_rl.data.tokenizer import answer_lead
from medtvt_rl.learner.scoring import ScoredSequence
from medtvt_rl.types import MODALITIES

OTHERS_WITHHELD = 0.5
"""Share of single-modality questions that are asked with the other modalities withheld."""

QuestionEncoder = Callable[[str], NDArray[np.int32]]


class ExampleSource(Protocol):
    """Where the examples of an epoch come from."""

    def epoch(self, epoch: int) -> list[ScoredSequence]:
        """The examples of an epoch: a function of the seed and the epoch, equal on all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Withholding:
    """How modalities are left out.

    Attributes:
        probability: of each modality, independently, where a question is about all of them.
        seed: of the choice, with the epoch.
    """

    probability: float
    seed: int


class QaExamples:
    """Questions and answers of a study store as training sequences.

    A question about one modality (kinds ecg, cxr, lab) is asked with the others withheld half of the time. A diagnosis
    loses each modality with the configured probability, never all, and its reasoning then says "not available" there:
    the model must not learn to state findings that it cannot see.
    """

    def __init__(
        self, examples: Sequence[QAExample], encode_question: QuestionEncoder, tokenizer: Any, withholding: Withholding
    ) -> None:
        if not examples:
            raise ValueError("examples: there are none; check data.qa and the problems.csv of the study store")
        self._examples, self._withholding = list(examples), withholding
        self._tokenizer, self._lead = tokenizer, answer_lead(tokenizer)
        questions = {example.question for example in self._examples}
        self._prompts = {question: encode_question(question) for question in questions}
        self._answers: dict[str, NDArray[np.int32]] = {}

    def epoch(self, epoch: int) -> list[ScoredSequence]:
        """The examples of an epoch, with fresh choices of what is withheld."""
        generator = np.random.default_rng((self._withholding.seed, epoch))
        return [self._example(example, self._withheld(example, generator)) for example in self._examples]

    def complete(self) -> list[ScoredSequence]:
        """The examples with nothing withheld, for validation."""
        return [self._example(example, ()) for example in self._examples]

    def _withheld(self, example: QAExample, generator: np.random.Generator) -> tuple[str, ...]:
        if example.kind in MODALITIES:
            alone = generator.random() < OTHERS_WITHHELD
            return tuple(m for m in MODALITIES if m != example.kind) if alone else ()
        drawn = generator.random(len(MODALITIES)) < self._withholding.probability
        return () if drawn.all() else tuple(m for m, withheld in zip(MODALITIES, drawn) if withheld)

    def _example(self, example: QAExample, withheld: Sequence[str]) -> ScoredSequence:
        answer = without_sections(example.answer, withheld) if example.kind not in MODALITIES else example.answer
        item_id = without(example.study_id, *withheld)
        return ScoredSequence(
            prompt_ids=self._prompts[example.question], completion_ids=self._encode_answer(answer), item_id=item_id
        )

    def _encode_answer(self, answer: str) -> NDArray[np.int32]:
        """The answer's tokens, as the model is to write them, and the end token; answers repeat from epoch to epoch."""
        if answer not in self._answers:
            ids = self._tokenizer(self._lead + answer, add_special_tokens=False)["input_ids"]
            self._answers[answer] = np.array([*ids, self._tokenizer.eos_token_id], dtype=np.int32)
        return self._answers[answer]


_HEADINGS = "|".join(SECTIONS.values())


def without_sections(text: str, withheld: Sequence[str]) -> str:
    """A reasoning text whose sections of the withheld modalities say "ECG: not available." instead."""
    for modality in withheld:
        heading = SECTIONS[modality]
        section = re.compile(rf"\b{heading}\s*:.*?(?=\s*\b(?:{_HEADINGS})\s*:|\s*</think>|\s*$)", re.DOTALL)
        text = section.sub(f"{heading}: {NOT_AVAILABLE}.", text, count=1)
    return text
