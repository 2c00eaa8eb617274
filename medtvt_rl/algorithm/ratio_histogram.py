"""How importance ratios are spread over a step, in a form that ranks can add up.

Owns: counts in bins of equal width in log(ratio), and quantiles read from them. Does not own: the ratios
(importance.py), or their reduction over ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medtvt_rl.algorithm.kl import MAX_LOG_RATIO

BIN_WIDTH = 0.01
"""In nats. A quantile is the middle of its bin, so it is right to half a width: 0.5 % of the ratio."""
_MIDDLE = round(MAX_LOG_RATIO / BIN_WIDTH)
NUM_BINS = 2 * _MIDDLE + 1


def ratio_histogram(log_ratios: Tensor) -> Tensor:
    """Counts by bin, [NUM_BINS] float64 on the CPU; the bin in the middle lies around ratio 1.

    Args:
        log_ratios: [N], no NaN; beyond +-20 they fall into the outermost bins.
    """
    bins = (log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) / BIN_WIDTH).round().long() + _MIDDLE
    return torch.bincount(bins.cpu(), minlength=NUM_BINS).double()


def ratio_quantile(counts: Tensor, share: float) -> float:
    """The ratio that `share` of those counted do not exceed, to 0.5 %; 1 where nothing was counted."""
    total = float(counts.sum())
    if total == 0:
        return 1.0
    # The tolerance keeps 0.99 * 100 = 99.00000000000001 from asking for the hundredth.
    rank = torch.tensor(share * total * (1 - 1e-12), dtype=counts.dtype)
    place = int(torch.searchsorted(counts.cumsum(0), rank).clamp(max=NUM_BINS - 1))
    return math.exp((place - _MIDDLE) * BIN_WIDTH)
