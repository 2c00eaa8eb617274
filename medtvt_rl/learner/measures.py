"""What is measured of a training step beside its loss.

Owns: the measures of a micro-batch, in a form that micro-batches and ranks add up, and the readable metrics made of
them. Does not own: the sums of the loss (algorithm/losses.py), or what is alarming about a metric
(evaluation/alarms.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medtvt_rl.algorithm.importance import ImportanceLevel, unit_log_ratios
from medtvt_rl.algorithm.losses import METRIC_SUMS, LossInputs, finalise_metrics
from medtvt_rl.algorithm.ratio_histogram import NUM_BINS, ratio_histogram, ratio_quantile
from medtvt_rl.learner.engine import TrainingEngine

SUMS = (
    *METRIC_SUMS,
    *("exact_entropy", "fresh_gap_sum", "fresh_tokens", "fresh_not_finite", "micro_batches", "tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Of one micro-batch, or of several together.

    Attributes:
        sums: [len(SUMS) + NUM_BINS] float64, the histogram of importance ratios last.
        largest: [2] float64, the gap to the engine and the logarithm of the importance ratio.
    """

    sums: Tensor
    largest: Tensor

    @classmethod
    def none(cls) -> Measures:
        """Of no micro-batch at all."""
        return cls(
            sums=torch.zeros(len(SUMS) + NUM_BINS, dtype=torch.float64),
            largest=torch.tensor([0.0, -math.inf], dtype=torch.float64),
        )

    def __add__(self, other: Measures) -> Measures:
        return Measures(sums=self.sums + other.sums, largest=torch.maximum(self.largest, other.largest))

    def reduced(self, engine: TrainingEngine) -> Measures:
        """Over all ranks (all ranks)."""
        return Measures(
            sums=engine.all_reduce(self.sums, "sum").cpu(), largest=engine.all_reduce(self.largest, "max").cpu()
        )


def measure(
    inputs: LossInputs,
    loss_sums: Mapping[str, Tensor],
    *,
    entropy: Tensor,
    fresh: Tensor,
    level: ImportanceLevel,
    num_tokens: int,
) -> Measures:
    """The measures of one micro-batch.

    Args:
        loss_sums: METRIC_SUMS, from the loss.
        entropy: [N] of the distributions that the counted tokens came from.
        fresh: [B, T] bool, tokens that the learner's present version sampled.
        num_tokens: of prompts and completions together.
    """
    gaps = (inputs.policy_logprobs.detach() - inputs.behaviour_logprobs).abs()[fresh & inputs.mask]
    finite = torch.isfinite(gaps)
    log_ratio, units = unit_log_ratios(inputs.proximal_logprobs, inputs.behaviour_logprobs, inputs.mask, level)
    ratios = log_ratio[units].double()
    values: dict[str, Tensor | float] = {
        **loss_sums,
        "exact_entropy": entropy.double().sum(),
        "fresh_gap_sum": gaps[finite].double().sum(),
        "fresh_tokens": len(gaps),
        "fresh_not_finite": (~finite).sum(),
        "micro_batches": 1,
        "tokens": num_tokens,
    }
    gap_max = math.inf if not bool(finite.all()) else float(gaps.max()) if len(gaps) else 0.0
    ratio_max = float(ratios.max()) if len(ratios) else -math.inf
    scalars = torch.tensor([float(values[name]) for name in SUMS], dtype=torch.float64)
    return Measures(
        sums=torch.cat([scalars, ratio_histogram(ratios)]),
        largest=torch.tensor([gap_max, ratio_max], dtype=torch.float64),
    )


def report(measures: Measures) -> dict[str, float]:
    """Readable metrics. Fresh tokens compare the learner with the engine at equal weights.

    Importance ratios are those before truncation, of tokens, or of sequences at level "sequence"; they are clamped to
    exp(+-20), and `importance_ratio_p99` is right to 0.5 %.
    """
    values, counts = dict(zip(SUMS, measures.sums.tolist())), measures.sums[len(SUMS) :]
    gap_max, log_ratio_max = measures.largest.tolist()
    ratio_max = math.exp(log_ratio_max) if values["importance_units"] else 1.0
    compared = values["fresh_tokens"] - values["fresh_not_finite"]
    return {
        **finalise_metrics(values),
        "importance_ratio_p99": min(ratio_quantile(counts, 0.99), ratio_max),
        "importance_ratio_max": ratio_max,
        "entropy": values["exact_entropy"] / max(values["num_tokens"], 1.0),
        "fresh_gap_mean": values["fresh_gap_sum"] / compared if compared else 0.0,
        "fresh_gap_max": gap_max,
        "fresh_tokens": values["fresh_tokens"],
        "fresh_not_finite": values["fresh_not_finite"],
        "micro_batches": values["micro_batches"],
        "tokens": values["tokens"],
    }
