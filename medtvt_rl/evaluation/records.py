"""What every metric is computed from: one record a study, of what is true and what was answered.

Owns: the record, and how it is read from texts. Does not own: the metrics; honest.py and paper.py are two readings of
the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.evaluation.bootstrap import Floats
from medtvt_rl.rewards.answer import ParsedAnswer, normalise, normalised_names, parse_answer
from medtvt_rl.rewards.overlap import membership

DISEASE_KEYS = tuple(normalise(name) for name in DISEASES)
NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyAnswers:
    """Completions for one study, as text: some sampled at the training temperature (may be none), one greedy."""

    sampled: tuple[str, ...]
    greedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """One study and its answers.

    Attributes:
        diagnoses: the true diseases as the data writes them.
        true: the same, normalised.
        findings: finding -> whether it is there; None where unknown.
        answers: the texts.
        greedy, sampled: the texts, read strictly; None for one that breaks the format.
    """

    study_id: str
    patient_id: str
    diagnoses: tuple[str, ...]
    true: frozenset[str]
    findings: Mapping[str, bool] | None
    answers: StudyAnswers
    greedy: ParsedAnswer | None
    sampled: tuple[ParsedAnswer | None, ...]


def study_record(
    study_id: str,
    patient_id: str,
    diagnoses: tuple[str, ...],
    findings: Mapping[str, bool] | None,
    answers: StudyAnswers,
) -> StudyRecord:
    """A record, its answers parsed once."""
    return StudyRecord(
        study_id=study_id,
        patient_id=patient_id,
        diagnoses=diagnoses,
        true=normalised_names(diagnoses),
        findings=findings,
        answers=answers,
        greedy=parse_answer(answers.greedy),
        sampled=tuple(parse_answer(text) for text in answers.sampled),
    )


def names_of(answer: ParsedAnswer | None) -> frozenset[str]:
    """The normalised names of an answer; none of one that breaks the format."""
    return answer.normalised if answer else NO_NAMES


def true_diseases(records: Sequence[StudyRecord]) -> NDArray[np.bool_]:
    """[n, 7] which diseases each study has."""
    return membership([record.true for record in records], DISEASE_KEYS)


def sampled_shares(records: Sequence[StudyRecord]) -> Floats:
    """[n, 7] share of each study's sampled answers that name each disease. Every study has at least one."""
    named = [membership([names_of(answer) for answer in record.sampled], DISEASE_KEYS) for record in records]
    return np.stack([row.mean(axis=0) for row in named])
