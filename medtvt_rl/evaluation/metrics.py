"""The metrics of a set-valued answer, as functions of sums over studies.

Owns: macro F1, AUC and average precision of the sums. Does not own: parsing of answers (rewards/answer.py), the counts
of one study and micro F1 (rewards/overlap.py), intervals (bootstrap.py), which answers are compared (diagnosis.py).
All of them take sums with leading dimensions, so that thousands of resamples are one call.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.evaluation.bootstrap import Floats, Measure
from medtvt_rl.rewards.overlap import divide, f1_of_counts, micro_f1


def macro_f1(sums: Floats) -> Floats:
    """[..., K * 3] -> mean F1 over keys; a key that was neither true nor named anywhere is left out of the mean."""
    return _mean_defined(f1_of_counts(sums.reshape(*sums.shape[:-1], -1, 3)))


def f1_measures(counts: Floats) -> tuple[Measure, Measure]:
    """Micro and macro F1 from confusion counts [n, K, 3]."""
    rows = counts.reshape(len(counts), -1)
    return Measure(rows=rows, statistic=micro_f1), Measure(rows=rows, statistic=macro_f1)


def ranking_measures(scores: Floats, true: NDArray[np.bool_]) -> tuple[Measure, Measure]:
    """Mean AUC and mean average precision over keys, from scores.

    Scores of a few levels (shares of a few samples) are counted by level, which makes both a function of sums.

    Args:
        scores: [n, K], higher is more likely.
        true: [n, K] bool.
    """
    levels, index = np.unique(scores, return_inverse=True)
    one_hot = np.eye(len(levels))[index.reshape(scores.shape)]
    counts = np.stack([one_hot * true[..., None], one_hot * ~true[..., None]], axis=2)
    rows = counts.reshape(len(scores), -1)
    shape = (scores.shape[1], 2, len(levels))
    return (
        Measure(rows=rows, statistic=partial(mean_auc, shape=shape)),
        Measure(rows=rows, statistic=partial(mean_average_precision, shape=shape)),
    )


def mean_auc(sums: Floats, shape: tuple[int, int, int]) -> Floats:
    """[..., K * 2 * L] counts by (key, true or not, level ascending) -> mean area under the ROC curve, ties count half.

    Keys for which all or no studies are true are left out of the mean.
    """
    positive, negative = _by_level(sums, shape)
    below = negative.cumsum(axis=-1) - negative
    wins = (positive * (below + 0.5 * negative)).sum(axis=-1)
    pairs = positive.sum(axis=-1) * negative.sum(axis=-1)
    return _mean_defined(divide(wins, pairs))


def mean_average_precision(sums: Floats, shape: tuple[int, int, int]) -> Floats:
    """[..., K * 2 * L] as in `mean_auc` -> mean over keys of sum over levels of precision times gain of recall."""
    positive, negative = (counts[..., ::-1] for counts in _by_level(sums, shape))
    found = positive.cumsum(axis=-1)
    precision = np.nan_to_num(divide(found, found + negative.cumsum(axis=-1)))
    return _mean_defined(divide((precision * positive).sum(axis=-1), positive.sum(axis=-1)))


def _by_level(sums: Floats, shape: tuple[int, int, int]) -> tuple[Floats, Floats]:
    counts = sums.reshape(*sums.shape[:-1], *shape)
    return counts[..., 0, :], counts[..., 1, :]


def _mean_defined(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(np.float64))
