"""Held-out evaluation of diagnoses: answers in, metrics with intervals over patients out.

Owns: which answers are compared with which truth, and the result. Does not own: generation of answers, what is made of
the records (honest.py by default, paper.py as published, text_metrics.py), the bootstrap (bootstrap.py).
Both readings are computed from one pass of answers; `evaluation.metrics` says which is shown first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from medtvt_rl.config import Config
from medtvt_rl.evaluation.bootstrap import (
    Floats,
    Interval,
    Measure,
    bootstrap_measures,
    bootstrap_paired_difference,
    mean_measure,
)
from medtvt_rl.evaluation.calibration import ReliabilityBin, reliability
from medtvt_rl.evaluation.honest import disease_measures, has_samples, honest_measures, honest_values
from medtvt_rl.evaluation.paper import num_dropped, paper_measures
from medtvt_rl.evaluation.records import StudyAnswers, StudyRecord, sampled_shares, study_record, true_diseases
from medtvt_rl.evaluation.text_metrics import BertScoreModel, Progress, compare_texts
from medtvt_rl.privacy import hashed
from medtvt_rl.types import MODALITIES, Prompt

MACRO = ("f1", "auc", "average_precision")
"""Metrics of a disease whose mean over diseases is a metric, too."""
F1_OF = "f1/"
"""What the F1 of a disease is named by, before the disease."""


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

    def reference(self, study_id: str) -> str:
        """The whole text that the data answers the study's diagnosis question with; "" where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiseaseResult:
    """What one disease was answered with.

    Attributes:
        positives, negatives: studies that have it, and that do not.
        metrics: name -> interval over patients, names as in `honest.disease_measures`; NaN where undefined.
    """

    positives: int
    negatives: int
    metrics: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {"positives": self.positives, "negatives": self.negatives}
        return {**counts, **{name: interval.to_dict() for name, interval in self.metrics.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosisResult:
    """Metrics of one policy on one set of studies.

    Attributes:
        study_ids, patient_ids: [n], aligned.
        metrics: name -> interval over patients. Names as in `DiagnosisEvaluator.evaluate`.
        diseases: disease -> its result.
        reliability: what was said and observed by bin of the sampled share; empty without sampled answers.
        paper: precision, recall, f1, auc, f1_micro, f1_macro as the published evaluation computes them.
        paper_dropped: answers that it leaves out.
        per_study: name -> [n] float64, for the metrics that are means over studies.
        measures: name -> what the metric is computed from, for paired differences.
    """

    study_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    metrics: dict[str, Interval]
    diseases: dict[str, DiseaseResult]
    reliability: list[ReliabilityBin]
    paper: dict[str, Interval]
    paper_dropped: int
    per_study: dict[str, Floats]
    measures: dict[str, Measure] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the per-study values; the F1 of a disease stands below `per_disease`."""
        named = {name: interval.to_dict() for name, interval in self.metrics.items()}
        defined = {
            name: sum(name in one.metrics and not np.isnan(one.metrics[name].value) for one in self.diseases.values())
            for name in MACRO
        }
        return {
            "num_studies": len(self.study_ids),
            "num_patients": len(set(self.patient_ids)),
            "metrics": {name: found for name, found in named.items() if not name.startswith(F1_OF)},
            "per_disease": {name.removeprefix(F1_OF): found for name, found in named.items() if name.startswith(F1_OF)},
            "by_disease": {name: one.to_dict() for name, one in self.diseases.items()},
            "diseases_in_mean": defined,
            "reliability": [one.to_dict() for one in self.reliability],
            "paper": {
                **{name: interval.to_dict() for name, interval in self.paper.items()},
                "answers_dropped": self.paper_dropped,
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResult:
    """The published comparison of texts.

    Attributes:
        metrics: bleu, rouge_l_recall, meteor, bertscore_recall, bleu_corpus -> interval; without what is missing.
        notes: name -> what is missing and how to get it.
    """

    metrics: dict[str, Interval]
    notes: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: interval.to_dict() for name, interval in self.metrics.items()}


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
        self._bertscore = BertScoreModel(
            name=config.evaluation.bertscore_model, layer=config.evaluation.bertscore_layer
        )
        self._known = self._store.study_ids(split)

    def evaluate(self, answers: Mapping[str, StudyAnswers]) -> DiagnosisResult:
        """Metrics over the answered studies.

        From the greedy answer: jaccard_greedy, exact_match, f1_micro, f1_macro, f1/DISEASE, parse_rate, and
        findings_f1_ecg, _cxr, _lab (findings named in the reasoning against those in the data; absent where the data
        has none). From the sampled answers, where there are any: jaccard, parse_rate_sampled, and of the share of
        answers that name a disease: auc, average_precision, brier, calibration_error.

        Args:
            answers: by study id; part of the split is enough.

        Raises:
            ValueError: no answers, or one for a study that is not in the split.
        """
        records = self._records(answers)
        per_study = honest_values(records)
        measures = honest_measures(records) | {name: mean_measure(values) for name, values in per_study.items()}
        patients = tuple(record.patient_id for record in records)
        return DiagnosisResult(
            study_ids=tuple(record.study_id for record in records),
            patient_ids=patients,
            metrics=self._intervals(measures, patients),
            diseases=self._diseases(records, patients),
            reliability=self._reliability(records, patients),
            paper=self._intervals(paper_measures(records), patients),
            paper_dropped=num_dropped(records),
            per_study=per_study,
            measures=measures,
        )

    def compare_texts(
        self, answers: Mapping[str, StudyAnswers], on_progress: Progress = lambda done: None
    ) -> TextResult:
        """The greedy answers against the reference answers, as texts.

        Args:
            on_progress: told how many studies are compared by BERTScore, which takes long: 0 first.

        Raises:
            ValueError: as `evaluate`, or a study without a reference answer.
        """
        records = self._records(answers)
        pairs = [(record.answers.greedy, self._store.reference(record.study_id)) for record in records]
        found = compare_texts(pairs, self._bertscore, on_progress)
        patients = tuple(record.patient_id for record in records)
        return TextResult(metrics=self._intervals(found.measures, patients), notes=found.notes)

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

    def _records(self, answers: Mapping[str, StudyAnswers]) -> list[StudyRecord]:
        if not answers:
            raise ValueError("answers: none, expected at least one study")
        unknown = sorted(set(answers).difference(self._known))
        if unknown:
            example = hashed(unknown[0])
            raise ValueError(f"answers: {len(unknown)} studies are not in split {self._split!r}, e.g. {example}")
        return [
            study_record(
                study_id,
                self._store.patient_id(study_id),
                tuple(self._store.diagnoses(study_id)),
                self._store.findings(study_id),
                answers[study_id],
            )
            for study_id in self._known
            if study_id in answers
        ]

    def _intervals(self, measures: dict[str, Measure], patients: Sequence[str]) -> dict[str, Interval]:
        return bootstrap_measures(measures, self._resamples, self._seed, patients) if measures else {}

    def _diseases(self, records: Sequence[StudyRecord], patients: Sequence[str]) -> dict[str, DiseaseResult]:
        by_disease = disease_measures(records)
        flat = {f"{metric}/{name}": m for name, measures in by_disease.items() for metric, m in measures.items()}
        intervals = self._intervals(flat, patients)
        counts = dict(zip(by_disease, true_diseases(records).sum(axis=0).tolist()))
        return {
            name: DiseaseResult(
                positives=counts[name],
                negatives=len(records) - counts[name],
                metrics={metric: intervals[f"{metric}/{name}"] for metric in measures},
            )
            for name, measures in by_disease.items()
        }

    def _reliability(self, records: Sequence[StudyRecord], patients: Sequence[str]) -> list[ReliabilityBin]:
        if not has_samples(records):
            return []
        return reliability(sampled_shares(records), true_diseases(records), self._resamples, self._seed, patients)


def _open_store(path: str) -> TruthSource:
    from medtvt_rl.data.study_store import StudyStore  # here, so that a given store needs no Arrow

    return StudyStore.open(path)
