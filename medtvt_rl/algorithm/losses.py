"""The policy loss: pure functions from log-probs and advantages to a scalar and sums for the log.

Owns: the clipped objectives of five papers, the KL term in the loss, their aggregation, and what is counted on the way.
Does not own: the forward pass, the micro-batches, or any process group. Denominators are global and come from the
caller, so the losses of all micro-batches of all ranks ADD UP to the loss of the step, however it was cut into pieces.
Where gradients are averaged over ranks, not summed, the caller multiplies the loss by their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medtvt_rl.algorithm.config import LOSSES, LossConfig
from medtvt_rl.algorithm.importance import importance_weights, unit_log_ratios
from medtvt_rl.algorithm.kl import MAX_LOG_RATIO, token_kl
from medtvt_rl.dotted import resolve

# Every call returns all of these, in this order, so that ranks can stack and reduce them.
METRIC_SUMS = (
    "policy_loss",
    "kl_loss",
    "num_sequences",
    "num_tokens",
    "ratio_sum",
    "clip_low_tokens",
    "clip_high_tokens",
    "surprise_sum",
    "kl_sum",
    "engine_gap_sum",
    "engine_gap_squared_sum",
    "importance_sum",
    "importance_cut_tokens",
    "importance_units",
    "importance_ratio_sum",
    "unit_weight_sum",
    "unit_weight_squared_sum",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """One padded micro-batch. Where `mask` is False the log-probs may hold anything, also inf and NaN.

    Attributes:
        policy_logprobs: [B, T], differentiated.
        proximal_logprobs: [B, T], of the learner before the update.
        behaviour_logprobs: [B, T], of the engine when it sampled.
        reference_logprobs: [B, T] of the frozen policy, or None.
        advantages: [B].
        mask: [B, T] bool, True at completion tokens.
    """

    policy_logprobs: Tensor
    proximal_logprobs: Tensor
    behaviour_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shape = self.mask.shape
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise ValueError(f"mask: {tuple(shape)} {self.mask.dtype}, expected (B, T) torch.bool")
        for name in ("policy_logprobs", "proximal_logprobs", "behaviour_logprobs", "reference_logprobs"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(shape)} as the mask")
        if self.advantages.shape != shape[:1]:
            raise ValueError(f"advantages: shape {tuple(self.advantages.shape)}, expected ({shape[0]},)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over the whole optimizer step, all ranks and micro-batches together.

    Attributes:
        num_sequences: completions of the step.
        num_tokens: completion tokens of the step.
        max_new_tokens: length limit of a completion; the constant of dr_grpo.
    """

    num_sequences: int
    num_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("num_sequences", "num_tokens", "max_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"denominators.{name}: {getattr(self, name)}, expected a count, 0 or more")


class Objective(Protocol):
    """What `grpo.loss.kind` may name by a dotted path."""

    def __call__(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
        """[B, T] what is maximised.

        Args:
            ratio: [B, T] policy / proximal, 1 at padding; differentiated, as `logprobs` [B, T] of the policy are.
            advantages: [B, 1].
        """


def policy_loss(inputs: LossInputs, config: LossConfig, denominators: Denominators) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, and the sums of METRIC_SUMS over its tokens.

    grpo     min(r A, clip(r) A), mean over the tokens of a sequence, then over sequences (https://arxiv.org/abs/2402.03300).
    dr_grpo  the same, divided by a constant length, so that long answers are not favoured (https://arxiv.org/abs/2503.20783).
    dapo     the same, mean over all tokens; meant with clip_high > clip_low (https://arxiv.org/abs/2503.14476).
    gspo     r is the geometric mean over the sequence, clipped as a whole (https://arxiv.org/abs/2507.18071).
    cispo    the clipped r without gradient weighs A log-prob, so no token is dropped (https://arxiv.org/abs/2506.13585);
             clip_low >= 1 leaves out the lower bound, as the paper does.
    module:f what f makes of r, the policy's log-probs and A, an Objective; mean over all tokens.
    r = policy / proximal. The importance weight proximal / behaviour multiplies the objective, not the KL term.

    Returns:
        A scalar (0 with zero gradient where the mask is empty), and detached float64 scalars by name.

    Raises:
        ValueError: a KL term in the loss without reference log-probs, or an unknown kind.
    """
    with_kl = config.kl.coefficient != 0 and config.kl.placement == "loss"
    if with_kl and inputs.reference_logprobs is None:
        raise ValueError(
            f"reference_logprobs: None, expected [B, T] with loss.kl.coefficient {config.kl.coefficient}; "
            "start a reference policy, or set the coefficient to 0"
        )
    mask = inputs.mask
    policy = _masked(inputs.policy_logprobs, mask)
    proximal = _masked(inputs.proximal_logprobs.detach(), mask)
    behaviour = _masked(inputs.behaviour_logprobs.detach(), mask)
    advantages = inputs.advantages.to(policy.dtype)[:, None]
    ratio = _ratio(policy - proximal, mask, sequence_level=config.kind == "gspo")
    weights, cut = importance_weights(proximal, behaviour, mask, config.importance)
    objective = weights * _objective(ratio, policy, advantages, config)
    loss = -_aggregate(objective, mask, config, denominators)
    kl = torch.zeros_like(policy)
    if inputs.reference_logprobs is not None:
        kl = token_kl(policy, _masked(inputs.reference_logprobs.detach(), mask), config.kl.estimator)
    kl_loss = config.kl.coefficient * _aggregate(kl, mask, config, denominators) if with_kl else torch.zeros_like(loss)
    below, above = _clipped(ratio, advantages, mask, config)
    gap = proximal - behaviour
    sums = (
        *(loss, kl_loss, mask.any(dim=1).sum(), mask.sum()),
        *(_total(ratio, mask), below.sum(), above.sum(), -policy.sum(), _total(kl, mask)),
        *(gap.abs().sum(), gap.square().sum(), weights.sum(), cut.sum()),
        *_unit_sums(proximal, behaviour, weights, mask, config),
    )
    return loss + kl_loss, {name: value.detach().double() for name, value in zip(METRIC_SUMS, sums, strict=True)}


def sequence_losses(inputs: LossInputs, config: LossConfig, denominators: Denominators) -> Tensor:
    """[B] float32 or float64, without gradient: what each sequence adds to the loss, to tell which one is at fault."""
    with torch.no_grad():
        rows = [_row(inputs, index) for index in range(len(inputs.mask))]
        return torch.stack([policy_loss(row, config, denominators)[0] for row in rows])


def _row(inputs: LossInputs, index: int) -> LossInputs:
    rows = slice(index, index + 1)
    reference = inputs.reference_logprobs
    return LossInputs(
        policy_logprobs=inputs.policy_logprobs[rows],
        proximal_logprobs=inputs.proximal_logprobs[rows],
        behaviour_logprobs=inputs.behaviour_logprobs[rows],
        reference_logprobs=None if reference is None else reference[rows],
        advantages=inputs.advantages[rows],
        mask=inputs.mask[rows],
    )


def finalise_metrics(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """What is logged, from the METRIC_SUMS added over all micro-batches and ranks of a step.

    `entropy` is the mean negative log-prob of the sampled tokens, an estimate; `engine_gap` is
    |proximal - behaviour| per token: at staleness 0 the numerics of engine against learner, beyond it also what the
    policy has moved since. `importance_mean` is of the weights as used; `importance_ratio_mean` of the ratios before
    truncation, and `ess_share` (sum w)^2 / (n sum w^2) of the weights, both over tokens, or over sequences at level
    "sequence"; both are 1 where nothing was counted.
    """
    values = {name: float(sums[name]) for name in METRIC_SUMS}
    tokens = max(values["num_tokens"], 1.0)
    units, squares = values["importance_units"], values["unit_weight_squared_sum"]
    ess_share = values["unit_weight_sum"] ** 2 / (units * squares) if squares else 0.0
    return {
        "loss": values["policy_loss"] + values["kl_loss"],
        "policy_loss": values["policy_loss"],
        "kl_loss": values["kl_loss"],
        "num_sequences": values["num_sequences"],
        "num_tokens": values["num_tokens"],
        "ratio_mean": values["ratio_sum"] / tokens,
        "clip_low_share": values["clip_low_tokens"] / tokens,
        "clip_high_share": values["clip_high_tokens"] / tokens,
        "entropy": values["surprise_sum"] / tokens,
        "kl": values["kl_sum"] / tokens,
        "engine_gap": values["engine_gap_sum"] / tokens,
        "engine_gap_rms": (values["engine_gap_squared_sum"] / tokens) ** 0.5,
        "importance_mean": values["importance_sum"] / tokens,
        "importance_cut_share": values["importance_cut_tokens"] / tokens,
        "importance_ratio_mean": values["importance_ratio_sum"] / units if units else 1.0,
        "ess_share": ess_share if units else 1.0,
    }


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zeros at padding, at least float32. `where`, not a product: 0 * inf is NaN, in the gradient too."""
    values = values if values.dtype == torch.float64 else values.float()
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _total(values: Tensor, mask: Tensor) -> Tensor:
    return _masked(values.detach(), mask).sum()


def _unit_sums(
    proximal: Tensor, behaviour: Tensor, weights: Tensor, mask: Tensor, config: LossConfig
) -> tuple[Tensor, ...]:
    """How many units there are, and the sums of their ratios, weights and squared weights."""
    log_ratio, units = unit_log_ratios(proximal, behaviour, mask, config.importance.level)
    used = weights[units].double()
    return units.sum(), log_ratio[units].double().exp().sum(), used.sum(), used.square().sum()


def _ratio(log_ratio: Tensor, mask: Tensor, *, sequence_level: bool) -> Tensor:
    """[B, T] policy / proximal; at sequence level every token carries the geometric mean of its sequence."""
    if sequence_level:
        mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _objective(ratio: Tensor, policy: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """[B, T] what is maximised."""
    if ":" in config.kind:
        own: Objective = resolve(config.kind, "grpo.loss.kind")
        found = own(ratio, policy, advantages, config)
        if found.shape != ratio.shape:
            raise ValueError(f"grpo.loss.kind: {config.kind} made {list(found.shape)}, expected {list(ratio.shape)}")
        return found
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.kind == "cispo":
        return clipped.detach() * advantages * policy
    return torch.minimum(ratio * advantages, clipped * advantages)


def _clipped(ratio: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """[B, T] bool each: where the lower, where the upper bound took effect. cispo clips whatever the advantage is."""
    below, above = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    if config.kind != "cispo":
        below, above = below & (advantages < 0), above & (advantages > 0)
    return below & mask, above & mask


def _aggregate(values: Tensor, mask: Tensor, config: LossConfig, denominators: Denominators) -> Tensor:
    """This micro-batch's share of the step's mean, as `config.kind` defines the mean."""
    values = _masked(values, mask)
    if config.kind in ("grpo", "gspo"):
        per_sequence = values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return per_sequence.sum() / max(denominators.num_sequences, 1)
    if config.kind == "dr_grpo":
        return values.sum() / max(denominators.num_sequences * denominators.max_new_tokens, 1)
    if config.kind in ("dapo", "cispo") or ":" in config.kind:
        return values.sum() / max(denominators.num_tokens, 1)
    raise ValueError(f"loss.kind: {config.kind!r}, expected one of {', '.join(LOSSES)}, or 'package.module:function'")
