"""How far two sets of names agree: counts of hits, false alarms and misses, and their F1.

Owns: membership of given keys, the counts, micro F1; shared by rewards and evaluation, so that both count alike. Does
not own: which sets are compared, or what is made of many of them (evaluation/metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def membership(sets: Sequence[Set[str]], keys: Sequence[str]) -> NDArray[np.bool_]:
    """[n, K] whether each set holds each key."""
    return np.array([[key in members for key in keys] for members in sets], dtype=bool).reshape(len(sets), len(keys))


def confusion_counts(named: Sequence[Set[str]], true: Sequence[Set[str]], keys: Sequence[str]) -> Floats:
    """[n, K, 3] true positives, false positives and false negatives of each set and key. Other names are left out."""
    said, holds = membership(named, keys), membership(true, keys)
    return np.stack([said & holds, said & ~holds, ~said & holds], axis=-1).astype(np.float64)


def micro_f1(sums: Floats) -> Floats:
    """[..., K * 3] -> F1 of the counts of all keys together; NaN where nothing was true or named."""
    return f1_of_counts(sums.reshape(*sums.shape[:-1], -1, 3).sum(axis=-2))


def f1_of_counts(counts: Floats) -> Floats:
    """[..., 3] true positives, false positives and false negatives -> F1; NaN where all are 0."""
    hits, false_alarms, misses = counts[..., 0], counts[..., 1], counts[..., 2]
    return divide(2 * hits, 2 * hits + false_alarms + misses)


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator > 0)
