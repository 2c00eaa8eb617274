"""Whether a disease that a share s of the sampled answers names is there in a share s of the patients.

Owns: the bins, what was said and observed in each, the calibration error. Does not own: the shares (records.py),
intervals (bootstrap.py), the chart (charts.py). All diseases count together, one pair a study and disease.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.evaluation.bootstrap import Floats, Interval, Measure, bootstrap_measures, ratio
from medtvt_rl.rewards.overlap import divide

MAX_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """The pairs of study and disease whose share lies in one bin.

    Attributes:
        said: mean share.
        observed: share of the pairs in which the disease is there.
        pairs: how many there are, at least 1.
    """

    said: float
    observed: Interval
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"said": self.said, "observed": self.observed.to_dict(), "pairs": self.pairs}


def reliability(
    shares: Floats, true: NDArray[np.bool_], resamples: int, seed: int, clusters: Sequence[str] | None = None
) -> list[ReliabilityBin]:
    """The bins that hold a pair, by rising share; intervals over patients.

    Shares of at most ten samples have a bin for each value they can take; more are put into ten bins of equal width.

    Args:
        shares: [n, K] in 0..1.
        true: [n, K].
    """
    said, there, counts = _by_bin(shares, true)
    columns = range(counts.shape[1])
    measures = {str(b): Measure(rows=np.stack([there[:, b], counts[:, b]], axis=1), statistic=ratio) for b in columns}
    observed = bootstrap_measures(measures, resamples, seed, clusters)
    return [
        ReliabilityBin(
            said=float(said[:, b].sum() / counts[:, b].sum()), observed=observed[str(b)], pairs=int(counts[:, b].sum())
        )
        for b in columns
    ]


def calibration_error(shares: Floats, true: NDArray[np.bool_]) -> Measure:
    """Mean over pairs of the distance between said and observed in the pair's bin (expected calibration error).

    Guo et al., https://arxiv.org/abs/1706.04599, eq. 5.
    """
    said, there, counts = _by_bin(shares, true)
    return Measure(rows=np.concatenate([said - there, counts], axis=1), statistic=_mean_distance)


def _mean_distance(sums: Floats) -> Floats:
    """[..., 2 * B] sums of (said - there) by bin, then counts by bin -> mean distance."""
    distances, counts = np.split(sums, 2, axis=-1)
    return divide(np.abs(distances).sum(axis=-1), counts.sum(axis=-1))


def _by_bin(shares: Floats, true: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Three times [n, B]: each study's sum of shares, of true diseases, and of pairs, in the bins that hold any."""
    few = len(np.unique(shares)) <= MAX_BINS + 1
    keys = shares if few else np.minimum(np.floor(shares * MAX_BINS), MAX_BINS - 1)
    levels, index = np.unique(keys, return_inverse=True)
    one_hot = np.eye(len(levels))[index.reshape(shares.shape)]
    said, there, counts = ((one_hot * values[..., None]).sum(axis=1) for values in (shares, true, np.ones_like(shares)))
    return said, there, counts
