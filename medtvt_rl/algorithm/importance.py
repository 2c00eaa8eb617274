"""Correction for tokens that another policy sampled than the one which is now improved.

Owns: the ratio proximal / behaviour of each token, and the weight that is made of it, truncated or masked. Does not
own: the ratio policy / proximal, which the loss clips. The two differ by weight updates since the token was sampled and
by numerics between engine and learner.
Truncation after Ionides, "Truncated Importance Sampling" (2008); decoupling of the two ratios after
https://arxiv.org/abs/2505.24298; masking after https://arxiv.org/abs/2510.18855.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medtvt_rl.algorithm.config import ImportanceConfig
from medtvt_rl.algorithm.kl import MAX_LOG_RATIO

ImportanceLevel = Literal["token", "sequence"]


def importance_weights(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, config: ImportanceConfig
) -> tuple[Tensor, Tensor]:
    """Weight of each token, and which tokens were truncated or masked.

    truncated: min(ratio, cap) (Ionides, "Truncated Importance Sampling", 2008).
    masked: the ratio, or 0 above the cap and below the floor (https://arxiv.org/abs/2510.18855).
    none: 1.
    At level "sequence" every token carries the ratio of its whole completion, exp(sum of the differences).

    Args:
        proximal_logprobs, behaviour_logprobs: [B, T], anything where the mask is False.
        mask: [B, T] bool, True at completion tokens.

    Returns:
        weights [B, T], without gradient, 0 where the mask is False; cut [B, T] bool.

    Raises:
        ValueError: an unknown mode or level, or a cap that is not positive, or below the floor.
    """
    if config.mode not in ("none", "truncated", "masked"):
        raise ValueError(f"loss.importance.mode: {config.mode!r}, expected 'none', 'truncated' or 'masked'")
    if config.level not in ("token", "sequence"):
        raise ValueError(f"loss.importance.level: {config.level!r}, expected 'token' or 'sequence'")
    if config.cap <= 0:
        raise ValueError(f"loss.importance.cap: {config.cap}, expected a ratio above 0, usually 2")
    if not 0 <= config.floor < config.cap:
        raise ValueError(f"loss.importance.floor: {config.floor}, expected 0 (off) to below the cap {config.cap}")
    zero = torch.zeros((), dtype=proximal_logprobs.dtype, device=proximal_logprobs.device)
    if config.mode == "none":
        return torch.where(mask, torch.ones_like(zero), zero), torch.zeros_like(mask)
    ratio = _log_ratio(proximal_logprobs, behaviour_logprobs, mask, config.level).exp()
    cut = mask & (ratio > config.cap)
    if config.mode == "truncated":
        return torch.where(mask, ratio.clamp(max=config.cap), zero), cut
    cut = cut | (mask & (ratio < config.floor))
    return torch.where(mask & ~cut, ratio, zero), cut


def unit_log_ratios(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, level: ImportanceLevel
) -> tuple[Tensor, Tensor]:
    """The ratios before truncation, and where each is counted: once a token, or once a sequence at level "sequence".

    Returns:
        log(proximal / behaviour) [B, T], clamped to +-20; units [B, T] bool. A ratio that is NaN is no unit.
    """
    log_ratio = _log_ratio(proximal_logprobs, behaviour_logprobs, mask, level)
    units = mask if level == "token" else mask & (mask.cumsum(dim=1) == 1)
    return log_ratio, units & ~log_ratio.isnan()


def _log_ratio(proximal: Tensor, behaviour: Tensor, mask: Tensor, level: ImportanceLevel) -> Tensor:
    zero = torch.zeros((), dtype=proximal.dtype, device=proximal.device)
    log_ratio = torch.where(mask, (proximal - behaviour).detach(), zero)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
