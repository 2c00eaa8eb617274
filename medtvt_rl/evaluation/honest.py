"""The default reading of the records: an answer that breaks the format is a wrong answer.

Owns: which measures there are, over all diseases and for each. Does not own: parsing (records.py), the mathematics
(metrics.py, calibration.py), intervals (bootstrap.py).
An answer that breaks the format names no disease and no finding, earns no Jaccard, and stays in every denominator. How
sure a policy is of a disease is the share of its sampled answers that name it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtvt_rl.data.labels import DISEASES, FINDINGS
from medtvt_rl.evaluation.bootstrap import Floats, Measure, mean_measure, ratio
from medtvt_rl.evaluation.calibration import calibration_error
from medtvt_rl.evaluation.metrics import f1_measures, ranking_measures
from medtvt_rl.evaluation.records import (
    DISEASE_KEYS,
    NO_NAMES,
    StudyRecord,
    names_of,
    sampled_shares,
    true_diseases,
)
from medtvt_rl.rewards.evidence import asserted_findings, labelled_findings
from medtvt_rl.rewards.jaccard import jaccard_reward
from medtvt_rl.rewards.overlap import confusion_counts


def honest_values(records: Sequence[StudyRecord]) -> dict[str, Floats]:
    """Name -> [n], for the metrics that are means over studies; those of sampled answers only where all have some."""
    values = {
        "jaccard_greedy": np.array([_jaccard(record, record.answers.greedy) for record in records]),
        "exact_match": np.array([r.greedy is not None and r.greedy.normalised == r.true for r in records], dtype=float),
        "parse_rate": np.array([record.greedy is not None for record in records], dtype=float),
    }
    if has_samples(records):
        values |= {
            "jaccard": np.array([np.mean([_jaccard(r, text) for text in r.answers.sampled]) for r in records]),
            "parse_rate_sampled": np.array([np.mean([a is not None for a in r.sampled]) for r in records]),
            "brier": ((sampled_shares(records) - true_diseases(records)) ** 2).mean(axis=1),
        }
    return values


def honest_measures(records: Sequence[StudyRecord]) -> dict[str, Measure]:
    """Name -> measure, beside those of `honest_values`: F1 over diseases and findings; of sampled answers AUC, average
    precision and calibration error."""
    counts = _counts(records)
    measures = dict(zip(("f1_micro", "f1_macro"), f1_measures(counts)))
    measures |= {f"f1/{name}": f1_measures(counts[:, [i]])[0] for i, name in enumerate(DISEASES)}
    measures |= _findings_measures(records)
    if has_samples(records):
        shares, true = sampled_shares(records), true_diseases(records)
        measures |= dict(zip(("auc", "average_precision"), ranking_measures(shares, true)))
        measures["calibration_error"] = calibration_error(shares, true)
    return measures


def disease_measures(records: Sequence[StudyRecord]) -> dict[str, dict[str, Measure]]:
    """Disease -> name -> measure: precision, recall and F1 of the greedy answer; of the sampled ones AUC, average
    precision and Brier score. One that is undefined, as AUC without a patient who has the disease, is NaN."""
    counts = _counts(records)
    found: dict[str, dict[str, Measure]] = {}
    for index, name in enumerate(DISEASES):
        hits, false_alarms, misses = counts[:, index].T
        found[name] = {
            "precision": Measure(rows=np.stack([hits, hits + false_alarms], axis=1), statistic=ratio),
            "recall": Measure(rows=np.stack([hits, hits + misses], axis=1), statistic=ratio),
            "f1": f1_measures(counts[:, [index]])[0],
        }
    if has_samples(records):
        shares, true = sampled_shares(records), true_diseases(records)
        for index, name in enumerate(DISEASES):
            auc, precision = ranking_measures(shares[:, [index]], true[:, [index]])
            brier = mean_measure((shares[:, index] - true[:, index]) ** 2)
            found[name] |= {"auc": auc, "average_precision": precision, "brier": brier}
    return found


def has_samples(records: Sequence[StudyRecord]) -> bool:
    """Whether every study has sampled answers."""
    return all(record.sampled for record in records)


def _counts(records: Sequence[StudyRecord]) -> Floats:
    """[n, 7, 3] of the greedy answers."""
    return confusion_counts([names_of(r.greedy) for r in records], [r.true for r in records], DISEASE_KEYS)


def _jaccard(record: StudyRecord, completion: str) -> float:
    return jaccard_reward(completion, "; ".join(record.diagnoses))


def _findings_measures(records: Sequence[StudyRecord]) -> dict[str, Measure]:
    """F1 of named against present findings, by modality, over the studies whose findings are known."""
    if all(record.findings is None for record in records):
        return {}
    named = [NO_NAMES if record.findings is None else asserted_findings(record.greedy) for record in records]
    present = [labelled_findings(record.findings) for record in records]
    return {
        f"findings_f1_{modality}": f1_measures(confusion_counts(named, present, keys))[0]
        for modality, keys in FINDINGS.items()
    }
