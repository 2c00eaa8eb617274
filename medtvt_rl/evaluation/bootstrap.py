"""Confidence intervals by resampling patients.

Owns: the percentile bootstrap for any statistic of sums over studies, alone or as a paired difference.
Does not own: the statistics (metrics.py). A resample only changes how often each patient counts, so it is one matrix
product: weights [resamples, patients] times per-patient sums. Efron and Tibshirani, "An Introduction to the
Bootstrap" (1993), ch. 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""[..., m] sums -> [...] values; NaN where the statistic is undefined."""

COVERAGE = 0.95
CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its 95 % bootstrap interval; NaN where undefined."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON: NaN becomes None."""
        pairs = (("value", self.value), ("low", self.low), ("high", self.high))
        return {name: None if np.isnan(number) else float(number) for name, number in pairs}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A metric as what each study adds to its sums, and what is made of the sums.

    Attributes:
        rows: [n, m] float64, one row a study.
        statistic: [..., m] -> [...].
    """

    rows: Floats
    statistic: Statistic


def ratio(sums: Floats) -> Floats:
    """[..., 2] -> numerator / denominator: a mean, from rows (value, 1). NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan))


def mean_measure(values: ArrayLike) -> Measure:
    """The mean of one value a study; a study whose value is NaN has none, and doesn't count."""
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    return Measure(rows=np.stack([np.where(known, column, 0.0), known.astype(np.float64)], axis=1), statistic=ratio)


def bootstrap_measures(
    measures: dict[str, Measure], resamples: int, seed: int, clusters: Sequence[str] | None = None
) -> dict[str, Interval]:
    """Intervals of several measures over the same studies, from the same resamples.

    Args:
        measures: name -> measure, all with n rows.
        clusters: [n] patient of each study; patients are resampled with all their studies. None: each study its own.

    Raises:
        ValueError: no study, unequal lengths, or fewer than one resample.
    """
    rows = np.concatenate([measure.rows for measure in measures.values()], axis=1)
    total, sums = _resampled(rows, resamples, seed, clusters)
    intervals, start = {}, 0
    for name, measure in measures.items():
        columns = slice(start, start + measure.rows.shape[1])
        start = columns.stop
        intervals[name] = _interval(measure.statistic(total[columns]), measure.statistic(sums[:, columns]))
    return intervals


def bootstrap_mean(values: ArrayLike, resamples: int, seed: int, clusters: Sequence[str] | None = None) -> Interval:
    """The mean of one value a study, e.g. its Jaccard score."""
    return bootstrap_measures({"mean": mean_measure(values)}, resamples, seed, clusters)["mean"]


def bootstrap_paired_difference(
    before: Measure, after: Measure, resamples: int, seed: int, clusters: Sequence[str] | None = None
) -> Interval:
    """statistic(after) - statistic(before) over the same studies; each resample takes the same patients on both sides.

    Raises:
        ValueError: not the same number of studies.
    """
    if len(before.rows) != len(after.rows):
        raise ValueError(
            f"paired difference: {len(before.rows)} studies before, {len(after.rows)} after; pair them first"
        )
    width = before.rows.shape[1]
    total, sums = _resampled(np.concatenate([before.rows, after.rows], axis=1), resamples, seed, clusters)
    values = after.statistic(total[width:]) - before.statistic(total[:width])
    return _interval(values, after.statistic(sums[:, width:]) - before.statistic(sums[:, :width]))


def _resampled(rows: Floats, resamples: int, seed: int, clusters: Sequence[str] | None) -> tuple[Floats, Floats]:
    """Sums over all studies [m], and over the studies of each resample [resamples, m]."""
    if len(rows) == 0:
        raise ValueError("bootstrap: no study, expected at least one")
    if resamples < 1:
        raise ValueError(f"evaluation.bootstrap_resamples: {resamples}, expected 1 or more, usually 2000")
    if clusters is not None:
        rows = _sums_by_cluster(rows, clusters)
    count = len(rows)
    generator = np.random.default_rng(seed)
    share = np.full(count, 1.0 / count)
    # Chunks bound the memory of the weights; the stream of random numbers does not depend on their size.
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    sums = [generator.multinomial(count, share, size=size).astype(np.float64) @ rows for size in sizes]
    return rows.sum(axis=0), np.concatenate(sums)


def _sums_by_cluster(rows: Floats, clusters: Sequence[str]) -> Floats:
    if len(clusters) != len(rows):
        raise ValueError(f"bootstrap clusters: {len(clusters)} for {len(rows)} studies, expected one a study")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def _interval(value: Floats, resampled: Floats) -> Interval:
    defined = resampled[~np.isnan(resampled)]
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (np.nan, np.nan)
    return Interval(value=float(value), low=float(low), high=float(high))
