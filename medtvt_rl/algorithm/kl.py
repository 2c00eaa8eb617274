"""Estimators of KL(policy || reference) from the log-probs of sampled tokens.

Owns: k1, k2, k3 per token, and the KL of a whole completion for the reward. Does not own: the weight of the term, or
where it is added. All three are from Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
k3 as a term of the loss is GRPO's (https://arxiv.org/abs/2402.03300); the KL as a part of the reward is that of
https://arxiv.org/abs/2203.02155.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 5e8: far beyond any sane ratio and far from overflow in float32, also when squared.
MAX_LOG_RATIO = 20.0


def token_kl(policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """KL estimate of each token, in nats.

    k1 = policy - reference: unbiased, of either sign. As a term of the loss its expected gradient on-policy is 0, so it
    belongs in the reward. k2 = (policy - reference)^2 / 2: biased, its gradient is that of the KL.
    k3 = exp(reference - policy) - (reference - policy) - 1: unbiased, never negative.

    Args:
        policy_logprobs, reference_logprobs: same shape; finite (the caller replaces padding first).

    Raises:
        ValueError: an unknown estimator.
    """
    difference = (policy_logprobs - reference_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"loss.kl.estimator: {estimator!r}, expected 'k1', 'k2' or 'k3'")


def sequence_kl(
    behaviour_logprobs: NDArray[np.float32], reference_logprobs: NDArray[np.float32], estimator: KlEstimator
) -> float:
    """KL estimate of one completion, summed over its tokens: what `placement: reward` subtracts, times the coefficient.

    Args:
        behaviour_logprobs, reference_logprobs: [T] float32; T = 0 gives 0.
    """
    behaviour = torch.as_tensor(np.array(behaviour_logprobs, dtype=np.float64))
    reference = torch.as_tensor(np.array(reference_logprobs, dtype=np.float64))
    return float(token_kl(behaviour, reference, estimator).sum())
