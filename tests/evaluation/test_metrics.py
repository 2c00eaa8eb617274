"""F1 by hand; F1, AUC and average precision, resampled ones included, against what scikit-learn 1.9.1 gives.

The package itself is not installed: transformers would import it into every process, which costs each 1.7 s.
"""

import numpy as np
import pytest

from medtvt_rl.evaluation.metrics import f1_measures, ranking_measures
from medtvt_rl.rewards.overlap import confusion_counts, membership

KEYS = ("a", "b", "c")
# AUC and average precision of each resample of `random_case`.
RESAMPLED = [
    (0.7787523152229033, 0.6555254974302592),
    (0.8663608461303701, 0.8254870217319663),
    (0.8547941094994235, 0.8206472942570878),
    (0.8203045181083107, 0.6356333933401602),
    (0.8780638227513228, 0.8417968544006751),
]


def test_confusion_counts_by_hand():
    counts = confusion_counts([{"a", "b", "other"}, set()], [{"a"}, {"c"}], KEYS)
    assert counts.tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 1]]]


def test_f1_by_hand():
    micro, macro = f1_measures(confusion_counts([{"a", "b"}, {"a"}], [{"a"}, {"a"}], KEYS))
    total = micro.rows.sum(axis=0)
    assert float(micro.statistic(total)) == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert float(macro.statistic(total)) == pytest.approx((1.0 + 0.0) / 2), "c was neither true nor named"


def random_case(n: int = 60, samples: int = 4):
    generator = np.random.default_rng(0)
    true = generator.random((n, 3)) < [0.5, 0.2, 0.7]
    shares = generator.binomial(samples, 0.3 + 0.4 * true) / samples
    return true, shares


def test_agrees_with_scikit_learn():
    true, shares = random_case()
    said = shares >= 0.5
    named = [{key for key, yes in zip(KEYS, row) if yes} for row in said]
    holds = [{key for key, yes in zip(KEYS, row) if yes} for row in true]
    assert (membership(named, KEYS) == said).all()
    micro, macro = f1_measures(confusion_counts(named, holds, KEYS))
    assert float(micro.statistic(micro.rows.sum(0))) == pytest.approx(0.72)
    assert float(macro.statistic(macro.rows.sum(0))) == pytest.approx(0.6257425200514631)
    auc, precision = ranking_measures(shares, true)
    assert float(auc.statistic(auc.rows.sum(0))) == pytest.approx(0.8381428001822738)
    assert float(precision.statistic(precision.rows.sum(0))) == pytest.approx(0.7467136399128144)


def test_a_resample_equals_the_metric_of_the_resampled_studies():
    true, shares = random_case()
    weights = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=5)
    auc, precision = ranking_measures(shares, true)
    assert auc.statistic(weights @ auc.rows) == pytest.approx([auc for auc, _ in RESAMPLED])
    assert precision.statistic(weights @ precision.rows) == pytest.approx([precision for _, precision in RESAMPLED])


def test_undefined_where_nothing_is_true():
    auc, precision = ranking_measures(np.zeros((4, 2)), np.zeros((4, 2), dtype=bool))
    assert np.isnan(auc.statistic(auc.rows.sum(0))) and np.isnan(precision.statistic(precision.rows.sum(0)))
    micro, macro = f1_measures(confusion_counts([set()], [set()], KEYS))
    assert np.isnan(micro.statistic(micro.rows.sum(0))) and np.isnan(macro.statistic(macro.rows.sum(0)))
