"""Held-out evaluation of diagnoses: answers in, metrics with intervals over patients out.

Owns: which answers are compared with which truth, and the names of the metrics. Does not own: generation of answers,
parsing (rewards/answer.py, rewards/evidence.py), the mathematics (metrics.py, bootstrap.py).
An answer that breaks the format is a wrong answer: it names no disease and no finding, and stays in every denominator.
The `paper` block leaves such answers out and ranks by 0/1, as the published evaluation does
(https://arxiv.org/abs/2506.18512); it is for comparison only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from medtvt_rl.config import Config
from medtvt_rl.data.labels import DISEASES, FINDINGS
from medtvt_rl.evaluation.bootstrap import (
    Floats,
    Interval,
    Measure,
    bootstrap_measures,
    bootstrap_paired_difference,
    mean_measure,
)
from medtvt_rl.evaluation.metrics import f1_measures, ranking_measures
from medtvt_rl.rewards.answer import ParsedAnswer, normalise, normalised_names, parse_answer
from medtvt_rl.rewards.evidence import asserted_findings, labelled_findings
from medtvt_rl.rewards.jaccard import jaccard_reward
from medtvt_rl.rewards.overlap import confusion_counts, membership
from medtvt_rl.types import MODALITIES, Prompt

DISEASE_KEYS = tuple(normalise(name) for name in DISEASES)
NO_NAMES: frozenset[str] = frozenset()


class TruthSource(Protocol):
    """What the evaluator asks of a study store."""

    def study_ids(self, split: str) -> list[str]:
        """Studies of a split."""

    def patient_id(self, study_id: str) -> str:
        """The patient of a study."""

    def diagnoses(self, study_id: str) -> tuple[str, ...]:
        """True diseases."""

    def findings(self, study_id: str) -> dict[str, bool] | None:
        """Finding -> whether it is there; None where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyAnswers:
    """Completions for one study, as text: some sampled at the training temperature (may be none), one greedy."""

    sampled: tuple[str, ...]
    greedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosisResult:
    """Metrics of one policy on one set of studies.

    Attributes:
        study_ids, patient_ids: [n], aligned.
        metrics: name -> interval over patients. Names as in `DiagnosisEvaluator.evaluate`.
        paper: f1_micro, f1_macro, auc as the published evaluation computes them.
        per_study: name -> [n] float64, for the metrics that are means over studies.
        measures: name -> what the metric is computed from, for paired differences.
    """

    study_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    metrics: dict[str, Interval]
    paper: dict[str, Interval]
    per_study: dict[str, Floats]
    measures: dict[str, Measure] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the per-study values."""
        return {
            "num_studies": len(self.study_ids),
            "num_patients": len(set(self.patient_ids)),
            "metrics": {name: interval.to_dict() for name, interval in self.metrics.items()},
            "paper": {name: interval.to_dict() for name, interval in self.paper.items()},
        }


class DiagnosisEvaluator:
    """Compares answers with a split of the study store.

    Args:
        config: of the run; `config.data.store` is opened unless a store is given.
        split: every answered study must belong to it.
        store: stands in for the study store.

    Attributes:
        ablation_metric: what withholding a modality is measured by.
    """

    ablation_metric = "jaccard_greedy"

    def __init__(self, config: Config, split: str, store: TruthSource | None = None) -> None:
        self._store: TruthSource = _open_store(config.data.store) if store is None else store
        self._split = split
        self._resamples = config.evaluation.bootstrap_resamples
        self._seed = config.run.seed
        self._known = self._store.study_ids(split)

    def evaluate(self, answers: Mapping[str, StudyAnswers]) -> DiagnosisResult:
        """Metrics over the answered studies.

        From the greedy answer: jaccard_greedy, exact_match, f1_micro, f1_macro, f1/DISEASE, parse_rate, and
        findings_f1_ecg, _cxr, _lab (findings named in the reasoning against those in the data; absent where the data
        has none). From the sampled answers, where there are any: jaccard, parse_rate_sampled, and of the share of
        answers that name a
        disease: auc, average_precision, brier.

        Args:
            answers: by study id; part of the split is enough.

        Raises:
            ValueError: no answers, or one for a study that is not in the split.
        """
        study_ids = self._check(answers)
        truths = [normalised_names(tuple(self._store.diagnoses(study_id))) for study_id in study_ids]
        given = [answers[study_id] for study_id in study_ids]
        parsed = [parse_answer(answer.greedy) for answer in given]
        named = [p.normalised if p else NO_NAMES for p in parsed]
        per_study = {
            "jaccard_greedy": np.array([self._jaccard(study_id, answers[study_id].greedy) for study_id in study_ids]),
            "exact_match": np.array([p is not None and p.normalised == t for p, t in zip(parsed, truths)], dtype=float),
            "parse_rate": np.array([p is not None for p in parsed], dtype=float),
        }
        counts = confusion_counts(named, truths, DISEASE_KEYS)
        measures = dict(zip(("f1_micro", "f1_macro"), f1_measures(counts)))
        measures |= {f"f1/{name}": f1_measures(counts[:, [i]])[0] for i, name in enumerate(DISEASES)}
        measures |= self._findings_measures(study_ids, parsed)
        if all(answer.sampled for answer in given):
            per_study |= self._sampled_values(study_ids, given, truths)
            shares = _shares(given)
            true = membership(truths, DISEASE_KEYS)
            measures |= dict(zip(("auc", "average_precision"), ranking_measures(shares, true)))
        measures |= {name: mean_measure(values) for name, values in per_study.items()}
        patients = tuple(self._store.patient_id(study_id) for study_id in study_ids)
        paper = _paper_measures(counts, parsed, truths)
        return DiagnosisResult(
            study_ids=study_ids,
            patient_ids=patients,
            metrics=bootstrap_measures(measures, self._resamples, self._seed, patients),
            paper=bootstrap_measures(paper, self._resamples, self._seed, patients),
            per_study=per_study,
            measures=measures,
        )

    def ablations(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        """Modality -> the prompts with it withheld from every study."""
        from medtvt_rl.data.task import without  # here, for the same reason as in _open_store

        return {
            modality: [replace(prompt, item_id=without(str(prompt.item_id), modality)) for prompt in prompts]
            for modality in MODALITIES
        }

    def paired_gain(self, before: DiagnosisResult, after: DiagnosisResult, metric: str = "jaccard") -> Interval:
        """metric(after) - metric(before), paired over patients.

        Raises:
            ValueError: the two are not over the same studies, or one has no such metric.
        """
        if before.study_ids != after.study_ids:
            raise ValueError(
                f"paired gain of {metric}: {len(before.study_ids)} studies before, {len(after.study_ids)} after, not "
                "the same ones; evaluate both on the same studies"
            )
        for name, result in (("before", before), ("after", after)):
            if metric not in result.measures:
                raise ValueError(f"paired gain: no metric {metric!r} {name}, expected one of {sorted(result.measures)}")
        return bootstrap_paired_difference(
            before.measures[metric], after.measures[metric], self._resamples, self._seed, before.patient_ids
        )

    def _check(self, answers: Mapping[str, StudyAnswers]) -> tuple[str, ...]:
        if not answers:
            raise ValueError("answers: none, expected at least one study")
        unknown = sorted(set(answers).difference(self._known))
        if unknown:
            raise ValueError(f"answers: {len(unknown)} studies are not in split {self._split!r}, e.g. {unknown[0]!r}")
        return tuple(study_id for study_id in self._known if study_id in answers)

    def _jaccard(self, study_id: str, completion: str) -> float:
        return jaccard_reward(completion, "; ".join(self._store.diagnoses(study_id)))

    def _sampled_values(
        self, study_ids: Sequence[str], given: Sequence[StudyAnswers], truths: Sequence[frozenset[str]]
    ) -> dict[str, Floats]:
        """Per study: means over its sampled answers, and the Brier score over diseases."""
        true = membership(truths, DISEASE_KEYS)
        pairs = list(zip(study_ids, given))
        return {
            "jaccard": np.array([np.mean([self._jaccard(i, text) for text in a.sampled]) for i, a in pairs]),
            "parse_rate_sampled": np.array([np.mean([parse_answer(t) is not None for t in a.sampled]) for a in given]),
            "brier": ((_shares(given) - true) ** 2).mean(axis=1),
        }

    def _findings_measures(self, study_ids: Sequence[str], parsed: Sequence[ParsedAnswer | None]) -> dict[str, Measure]:
        """F1 of named against present findings, by modality, over the studies whose findings are known."""
        truths = [self._store.findings(study_id) for study_id in study_ids]
        if all(truth is None for truth in truths):
            return {}
        named = [NO_NAMES if truth is None else asserted_findings(answer) for truth, answer in zip(truths, parsed)]
        present = [labelled_findings(truth) for truth in truths]
        return {
            f"findings_f1_{modality}": f1_measures(confusion_counts(named, present, keys))[0]
            for modality, keys in FINDINGS.items()
        }


def _shares(given: Sequence[StudyAnswers]) -> Floats:
    """[n, 7] share of each study's sampled answers that name each disease."""
    parsed = [[parse_answer(text) for text in answer.sampled] for answer in given]
    named = [membership([p.normalised if p else NO_NAMES for p in row], DISEASE_KEYS) for row in parsed]
    return np.stack([row.mean(axis=0) for row in named])


def _paper_measures(
    counts: Floats, parsed: Sequence[ParsedAnswer | None], truths: Sequence[frozenset[str]]
) -> dict[str, Measure]:
    """Unparseable answers dropped; AUC of the greedy answers' 0/1."""
    keep = np.array([answer is not None for answer in parsed])
    micro, macro = f1_measures(counts * keep[:, None, None])
    said = membership([answer.normalised if answer else NO_NAMES for answer in parsed], DISEASE_KEYS)
    auc, _ = ranking_measures(said.astype(np.float64), membership(truths, DISEASE_KEYS))
    kept = Measure(rows=auc.rows * keep[:, None], statistic=auc.statistic)
    return {"f1_micro": micro, "f1_macro": macro, "auc": kept}


def _open_store(path: str) -> TruthSource:
    from medtvt_rl.data.study_store import StudyStore  # here, so that a given store needs no Arrow

    return StudyStore.open(path)
