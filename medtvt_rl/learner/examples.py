"""Supervised examples of an epoch: questions and answers as token ids.

Owns: where a stage's examples come from (the task, or the study store), which modalities one of a study goes without,
what its answer then says, and the checksum of the examples. Does not own: the questions and answers, the wording of
prompts (data/task.py), batching (supervised.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.config import Config
from medtvt_rl.data.labels import NOT_AVAILABLE, SECTIONS
from medtvt_rl.data.medtvt_qa import QAExample, QAKind
from medtvt_rl.data.study_build import store_folder
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.task import prompt_token_ids, without
from medtvt_rl.data.tokenizer import answer_lead
from medtvt_rl.dotted import resolve
from medtvt_rl.learner.scoring import ScoredSequence
from medtvt_rl.types import MODALITIES, Example
from medtvt_rl.user_code import guarded

QUESTIONS: dict[str, tuple[QAKind, ...]] = {"pretrain": ("ecg", "cxr", "lab"), "sft": ("diagnosis",)}
"""Stage -> the kinds of questions that it learns from a study store."""
OTHERS_WITHHELD = 0.5
"""Share of single-modality questions that are asked with the other modalities withheld."""

QuestionEncoder = Callable[[str], NDArray[np.int32]]


class ExampleSource(Protocol):
    """Where the examples of an epoch come from."""

    def epoch(self, epoch: int) -> list[ScoredSequence]:
        """The examples of an epoch: a function of the seed and the epoch, equal on all ranks."""

    def complete(self) -> list[ScoredSequence]:
        """The examples for validation: with nothing left out, and the same each time."""


def stage_examples(config: Config, tokenizer: Any, stage: str, split: str) -> ExampleSource:
    """What a stage learns from: SFT from `task.examples` where it is set, else from the questions of the study store.

    Raises:
        ValueError: there are none, or `task.examples` gave something else.
    """
    if stage == "sft" and config.task.examples is not None:
        name = f"task.examples {config.task.examples}"
        given = guarded(resolve(config.task.examples, "task.examples"), name)(config, tokenizer, split)
        return TaskExamples(given, tokenizer, f"task.examples {config.task.examples}, split {split!r}")
    store = StudyStore.open(store_folder(config.data))
    examples = [example for kind in QUESTIONS[stage] for example in store.qa(split, kind)]
    dropout = (config.pretrain if stage == "pretrain" else config.sft).modality_dropout
    withholding = Withholding(probability=dropout, seed=config.run.seed)
    tokens = config.model.perception.tokens_per_modality
    return QaExamples(examples, lambda question: prompt_token_ids(tokenizer, question, tokens), tokenizer, withholding)


def checksum_of(source: ExampleSource) -> str:
    """Of the content of the first epoch's examples, in their order: a source with other examples has another."""
    checksum = hashlib.sha256()
    for example in source.epoch(0):
        for ids in (example.prompt_ids, example.completion_ids):
            checksum.update(ids.astype(np.int64).tobytes() + b"|")
        checksum.update(f"{example.item_id}\n".encode())
    return checksum.hexdigest()


class TaskExamples:
    """The examples that a task gives, the same in every epoch.

    Args:
        source: who gave them, for the error.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Any, source: str) -> None:
        if not examples:
            raise ValueError(f"{source}: it gave no example, expected at least one")
        if wrong := [example for example in examples if not isinstance(example, Example)]:
            raise ValueError(f"{source}: it gave a {type(wrong[0]).__name__}, expected medtvt_rl.types.Example")
        lead = answer_lead(tokenizer)
        self._sequences = [
            ScoredSequence(
                prompt_ids=example.prompt.token_ids,
                completion_ids=answer_token_ids(tokenizer, lead + example.answer),
                item_id=example.prompt.item_id,
            )
            for example in examples
        ]

    def epoch(self, epoch: int) -> list[ScoredSequence]:
        """All of them."""
        return self._sequences

    def complete(self) -> list[ScoredSequence]:
        """All of them."""
        return self._sequences


def answer_token_ids(tokenizer: Any, answer: str) -> NDArray[np.int32]:
    """[T] int32: the answer's tokens and the end token."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)


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
            self._answers[answer] = answer_token_ids(self._tokenizer, self._lead + answer)
        return self._answers[answer]


_HEADINGS = "|".join(SECTIONS.values())


def without_sections(text: str, withheld: Sequence[str]) -> str:
    """A reasoning text whose sections of the withheld modalities say "ECG: not available." instead."""
    for modality in withheld:
        heading = SECTIONS[modality]
        section = re.compile(rf"\b{heading}\s*:.*?(?=\s*\b(?:{_HEADINGS})\s*:|\s*</think>|\s*$)", re.DOTALL)
        text = section.sub(f"{heading}: {NOT_AVAILABLE}.", text, count=1)
    return text
