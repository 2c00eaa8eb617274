"""Correction for tokens that another policy sampled than the one which is now improved.

Owns: the weight proximal / behaviour of each token, truncated or masked. Does not own: the ratio policy / proximal,
which the loss clips. The two differ by weight updates since the token was sampled and by numerics between engine and
learner.
Truncation after Ionides, "Truncated Importance Sampling" (2008); decoupling of the two ratios after
https://arxiv.org/abs/2505.24298; masking after https://arxiv.org/abs/2510.18855.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medtvt_rl.algorithm.config import ImportanceConfig
from medtvt_rl.algorithm.kl import MAX_LOG_RATIO


def importance_weights(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, config: ImportanceConfig
) -> tuple[Tensor, Tensor]:
    """Weight of each token, and which tokens were truncated or masked.

    truncated: min(ratio, cap) (Ionides, "Truncated Importance Sampling", 2008).
    masked: the ratio, or 0 above the cap (https://arxiv.org/abs/2510.18855).
    none: 1.
    At level "sequence" every token carries the ratio of its whole completion, exp(sum of the differences).

    Args:
        proximal_logprobs, behaviour_logprobs: [B, T], anything where the mask is False.
        mask: [B, T] bool, True at completion tokens.

    Returns:
        weights [B, T], without gradient, 0 where the mask is False; cut [B, T] bool.

    Raises:
        ValueError: an unknown mode or level, or a cap that is not positive.
    """
    if config.mode not in ("none", "truncated", "masked"):
        raise ValueError(f"loss.importance.mode: {config.mode!r}, expected 'none', 'truncated' or 'masked'")
    if config.level not in ("token", "sequence"):
        raise ValueError(f"loss.importance.level: {config.level!r}, expected 'token' or 'sequence'")
    if config.cap <= 0:
        raise ValueError(f"loss.importance.cap: {config.cap}, expected a ratio above 0, usually 2")
    zero = torch.zeros((), dtype=proximal_logprobs.dtype, device=proximal_logprobs.device)
    if config.mode == "none":
        return torch.where(mask, torch.ones_like(zero), zero), torch.zeros_like(mask)
    log_ratio = torch.where(mask, (proximal_logprobs - behaviour_logprobs).detach(), zero)
    if config.level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    cut = mask & (ratio > config.cap)
    capped = torch.where(cut, torch.full_like(zero, config.cap if config.mode == "truncated" else 0.0), ratio)
    return torch.where(mask, capped, zero), cut
