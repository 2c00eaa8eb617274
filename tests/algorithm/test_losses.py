"""Policy losses: by hand to 1e-6, and invariance to sharding, accumulation, padding and empty masks."""

import math
from dataclasses import replace

import pytest
import torch

from medtvt_rl.algorithm.config import ImportanceConfig, KlConfig, LossConfig
from medtvt_rl.algorithm.losses import (
    METRIC_SUMS,
    Denominators,
    LossInputs,
    finalise_metrics,
    policy_loss,
    sequence_losses,
)

KINDS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
PAD = float("nan")
NO_KL = KlConfig(coefficient=0.0)
NO_CORRECTION = ImportanceConfig(mode="none")


def hand_case() -> LossInputs:
    """Ratios 1.5, 0.5, 1 with advantage 1; ratio 0.5 with advantage -2. Two sequences of 3 and 1 tokens."""
    log = math.log
    return LossInputs(
        policy_logprobs=torch.tensor([[log(0.75), log(0.25), log(0.5)], [log(0.25), PAD, PAD]], requires_grad=True),
        proximal_logprobs=torch.tensor([[log(0.5), log(0.5), log(0.5)], [log(0.5), PAD, PAD]]),
        behaviour_logprobs=torch.tensor([[log(0.5), log(0.5), log(0.5)], [log(0.5), PAD, PAD]]),
        reference_logprobs=None,
        advantages=torch.tensor([1.0, -2.0]),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
    )


def hand_loss(kind: str, **changes) -> tuple[float, dict[str, float], LossInputs]:
    inputs = hand_case()
    config = LossConfig(**{"kind": kind, "kl": NO_KL, "importance": NO_CORRECTION, **changes})
    loss, sums = policy_loss(inputs, config, Denominators(num_sequences=2, num_tokens=4, max_new_tokens=5))
    loss.backward()
    return loss.item(), {name: float(value) for name, value in sums.items()}, inputs


# Clipped to [0.8, 1.2]. Objectives min(r A, clip(r) A): 1.2, 0.5, 1.0 | min(-1.0, -1.6) = -1.6
MEAN_LOG = (math.log(1.5) + math.log(0.5)) / 3
CISPO = 1.2 * math.log(0.75) + 0.8 * math.log(0.25) + math.log(0.5) + 0.8 * -2 * math.log(0.25)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", -(2.7 / 3 - 1.6) / 2),
        ("dr_grpo", -(2.7 - 1.6) / (2 * 5)),
        ("dapo", -(2.7 - 1.6) / 4),
        ("gspo", -(math.exp(MEAN_LOG) - 1.6) / 2),
        ("cispo", -CISPO / 4),
    ],
)
def test_by_hand(kind, expected):
    loss, _, _ = hand_loss(kind)
    assert loss == pytest.approx(expected, abs=1e-6)


def test_gradient_by_hand_and_zero_at_padding():
    _, _, inputs = hand_loss("dapo")
    # d(-r A)/dlogp = -r A / 4 where not clipped: the first token (1.5, A > 0) and the last (0.5, A < 0) are clipped
    expected = torch.tensor([[0.0, -0.5 / 4, -1.0 / 4], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(inputs.policy_logprobs.grad, expected, atol=1e-6, rtol=0)


def test_cispo_drops_no_token():
    _, _, inputs = hand_loss("cispo")
    expected = torch.tensor([[-1.2 / 4, -0.8 / 4, -1.0 / 4], [1.6 / 4, 0.0, 0.0]])
    torch.testing.assert_close(inputs.policy_logprobs.grad, expected, atol=1e-6, rtol=0)


def test_asymmetric_clip():
    loss, _, _ = hand_loss("dapo", clip_high=0.28)
    assert loss == pytest.approx(-(1.28 + 0.5 + 1.0 - 1.6) / 4, abs=1e-6)


def test_metrics_by_hand():
    _, sums, _ = hand_loss("grpo")
    assert tuple(sums) == METRIC_SUMS
    assert sums["num_tokens"] == 4 and sums["num_sequences"] == 2
    assert sums["clip_high_tokens"] == 1 and sums["clip_low_tokens"] == 1
    assert sums["ratio_sum"] == pytest.approx(3.5, abs=1e-6)
    final = finalise_metrics(sums)
    assert final["ratio_mean"] == pytest.approx(0.875, abs=1e-6)
    assert final["clip_low_share"] == final["clip_high_share"] == 0.25
    assert final["engine_gap"] == 0.0 and final["importance_mean"] == 1.0
    assert final["entropy"] == pytest.approx(-math.log(0.75 * 0.25 * 0.5 * 0.25) / 4, abs=1e-6)


@pytest.mark.parametrize(("advantage", "low", "high"), [(1.0, 0, 1), (-1.0, 2, 0)])
def test_a_bound_counts_only_where_it_takes_effect(advantage, low, high):
    inputs = replace(hand_case(), advantages=torch.full((2,), advantage))
    config = LossConfig(kl=NO_KL, importance=NO_CORRECTION)
    _, sums = policy_loss(inputs, config, Denominators(num_sequences=2, num_tokens=4, max_new_tokens=5))
    assert (int(sums["clip_low_tokens"]), int(sums["clip_high_tokens"])) == (low, high)


def test_importance_weight_multiplies_the_objective_and_not_the_kl():
    inputs = LossInputs(
        policy_logprobs=torch.tensor([[-1.0, -1.0]]),
        proximal_logprobs=torch.tensor([[-1.0, -1.0]]),
        behaviour_logprobs=torch.tensor([[-1.0 - math.log(5.0), -1.0 + math.log(2.0)]]),
        reference_logprobs=torch.tensor([[-1.5, -0.5]]),
        advantages=torch.tensor([3.0]),
        mask=torch.tensor([[True, True]]),
    )
    config = LossConfig(kind="dapo", kl=KlConfig(coefficient=0.1, estimator="k2"))
    loss, sums = policy_loss(inputs, config, Denominators(num_sequences=1, num_tokens=2, max_new_tokens=2))
    assert loss.item() == pytest.approx(-(2 * 3 + 0.5 * 3) / 2 + 0.1 * (0.125 + 0.125) / 2, abs=1e-6)
    final = finalise_metrics(sums)
    assert final["kl"] == pytest.approx(0.125, abs=1e-6)
    assert final["kl_loss"] == pytest.approx(0.0125, abs=1e-6)
    assert final["importance_cut_share"] == 0.5
    assert final["importance_mean"] == pytest.approx(1.25, abs=1e-6)
    assert final["engine_gap"] == pytest.approx((math.log(5) + math.log(2)) / 2, abs=1e-6)
    assert final["engine_gap_rms"] == pytest.approx(math.sqrt((math.log(5) ** 2 + math.log(2) ** 2) / 2), abs=1e-6)


def spread_case(**importance) -> dict[str, float]:
    """Ratios proximal / behaviour: 4, 1.5 | 0.5 | nothing. As sequences 6 and 0.5. The cap is 2."""
    log = math.log
    inputs = LossInputs(
        policy_logprobs=torch.zeros(3, 2),
        proximal_logprobs=torch.tensor([[log(4.0), log(1.5)], [log(0.5), PAD], [PAD, PAD]]),
        behaviour_logprobs=torch.tensor([[0.0, 0.0], [0.0, PAD], [PAD, PAD]]),
        reference_logprobs=None,
        advantages=torch.ones(3),
        mask=torch.tensor([[True, True], [True, False], [False, False]]),
    )
    config = LossConfig(kl=NO_KL, importance=ImportanceConfig(**importance))
    _, sums = policy_loss(inputs, config, Denominators(num_sequences=3, num_tokens=3, max_new_tokens=2))
    return finalise_metrics(sums)


@pytest.mark.parametrize(
    ("importance", "ratio_mean", "ess_share"),
    [
        ({"mode": "truncated"}, 2.0, (2 + 1.5 + 0.5) ** 2 / (3 * (4 + 2.25 + 0.25))),
        ({"mode": "masked"}, 2.0, (1.5 + 0.5) ** 2 / (3 * (2.25 + 0.25))),
        ({"mode": "none"}, 2.0, 1.0),
        ({"mode": "masked", "cap": 0.1}, 2.0, 0.0),
        ({"mode": "truncated", "level": "sequence"}, 3.25, (2 + 0.5) ** 2 / (2 * (4 + 0.25))),
        ({"mode": "masked", "level": "sequence"}, 3.25, 0.5),
    ],
)
def test_spread_of_the_importance_weights_by_hand(importance, ratio_mean, ess_share):
    metrics = spread_case(**importance)
    assert metrics["importance_ratio_mean"] == pytest.approx(ratio_mean, abs=1e-6)
    assert metrics["ess_share"] == pytest.approx(ess_share, abs=1e-6)


@pytest.mark.parametrize(("level", "ratio_mean"), [("token", 1.75), ("sequence", 0.5)])
def test_a_ratio_that_is_nan_is_left_out(level, ratio_mean):
    log = math.log
    inputs = replace(
        hand_case(),
        proximal_logprobs=torch.tensor([[math.nan, log(3.0), math.nan], [log(0.5), PAD, PAD]]),
        behaviour_logprobs=torch.zeros(2, 3),
    )
    config = LossConfig(kl=NO_KL, importance=ImportanceConfig(level=level))
    _, sums = policy_loss(inputs, config, Denominators(num_sequences=2, num_tokens=4, max_new_tokens=3))
    metrics = finalise_metrics(sums)
    assert metrics["importance_ratio_mean"] == pytest.approx(ratio_mean, abs=1e-6)
    assert 0 < metrics["ess_share"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_sequences_add_up_and_show_which_is_not_finite(kind):
    inputs, config = random_case(), LossConfig(kind=kind)
    denominators = Denominators(num_sequences=7, num_tokens=27, max_new_tokens=8)
    losses = sequence_losses(inputs, config, denominators)
    assert losses.shape == (7,) and not losses.requires_grad
    assert float(losses.sum()) == pytest.approx(policy_loss(inputs, config, denominators)[0].item(), abs=1e-12)
    inputs.advantages[4] = math.inf
    assert torch.isfinite(sequence_losses(inputs, config, denominators)).tolist() == [i != 4 for i in range(7)]


def random_case(num_sequences: int = 7, length: int = 6) -> LossInputs:
    generator = torch.Generator().manual_seed(3)

    def draw() -> torch.Tensor:
        return -torch.rand(num_sequences, length, generator=generator, dtype=torch.float64) * 3

    lengths = torch.tensor([6, 1, 4, 2, 5, 3, 6])
    return LossInputs(
        policy_logprobs=draw().requires_grad_(),
        proximal_logprobs=draw(),
        behaviour_logprobs=draw(),
        reference_logprobs=draw(),
        advantages=torch.randn(num_sequences, generator=generator, dtype=torch.float64),
        mask=torch.arange(length) < lengths[:, None],
    )


def part(inputs: LossInputs, rows: list[int], width: int | None = None, fill: float = PAD) -> LossInputs:
    """Some rows, padded or cut to another width."""

    def of(values: torch.Tensor) -> torch.Tensor:
        values = values[rows]
        extra = (width or values.shape[1]) - values.shape[1]
        return torch.nn.functional.pad(values, (0, extra), value=False if values.dtype == torch.bool else fill)

    names = ("policy_logprobs", "proximal_logprobs", "behaviour_logprobs", "reference_logprobs", "mask")
    return LossInputs(**{name: of(getattr(inputs, name)) for name in names}, advantages=inputs.advantages[rows])


CONFIGS = [
    LossConfig(kind=kind, kl=KlConfig(coefficient=0.1, estimator=estimator), importance=ImportanceConfig(level=level))
    for kind in KINDS
    for estimator, level in (("k3", "token"), ("k1", "sequence"))
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}-{c.importance.level}")
@pytest.mark.parametrize("fill", [PAD, float("inf"), -1e30])
def test_invariant_to_sharding_accumulation_and_padding(config, fill):
    inputs = random_case()
    denominators = Denominators(num_sequences=7, num_tokens=27, max_new_tokens=8)
    whole, whole_sums = policy_loss(inputs, config, denominators)
    (whole_gradient,) = torch.autograd.grad(whole, inputs.policy_logprobs)
    pieces = [part(inputs, [6, 0], 9, fill), part(inputs, [3], 7, fill), part(inputs, [1, 5, 2, 4], 6, fill)]
    results = [policy_loss(piece, config, denominators) for piece in pieces]
    total = sum(loss for loss, _ in results)
    (gradient,) = torch.autograd.grad(total, inputs.policy_logprobs)
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, whole_gradient, atol=1e-12, rtol=0)
    for name in METRIC_SUMS:
        assert sum(float(sums[name]) for _, sums in results) == pytest.approx(float(whole_sums[name]), abs=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}-{c.importance.level}")
def test_empty_mask_gives_zero_loss_and_gradient(config):
    inputs = random_case()
    empty = replace(inputs, mask=torch.zeros_like(inputs.mask))
    loss, sums = policy_loss(empty, config, Denominators(num_sequences=0, num_tokens=0, max_new_tokens=8))
    (gradient,) = torch.autograd.grad(loss, inputs.policy_logprobs)
    assert loss.item() == 0.0
    assert (gradient == 0).all()
    metrics = finalise_metrics(sums)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["importance_ratio_mean"] == metrics["ess_share"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_the_policy_gradient(kind):
    """At ratio 1 every objective has the gradient of advantage times log-prob under its own aggregation."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], requires_grad=True)
    inputs = LossInputs(
        policy_logprobs=logprobs,
        proximal_logprobs=logprobs.detach(),
        behaviour_logprobs=logprobs.detach(),
        reference_logprobs=None,
        advantages=torch.tensor([1.0, -1.0]),
        mask=torch.ones(2, 2, dtype=torch.bool),
    )
    denominators = Denominators(num_sequences=2, num_tokens=4, max_new_tokens=2)
    policy_loss(inputs, LossConfig(kind=kind, kl=NO_KL), denominators)[0].backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.25, -0.25], [0.25, 0.25]]), atol=1e-6, rtol=0)


def test_exploding_ratio_stays_finite():
    inputs = replace(random_case(), proximal_logprobs=torch.full((7, 6), -1e6, dtype=torch.float64))
    for kind in KINDS:
        loss, _ = policy_loss(
            inputs, LossConfig(kind=kind), Denominators(num_sequences=7, num_tokens=27, max_new_tokens=8)
        )
        assert torch.isfinite(loss)


def test_kl_without_reference_is_an_error_that_names_the_mend():
    with pytest.raises(ValueError, match="coefficient"):
        policy_loss(hand_case(), LossConfig(), Denominators(num_sequences=2, num_tokens=4, max_new_tokens=5))


def test_kl_in_the_reward_adds_no_loss():
    inputs = replace(hand_case(), reference_logprobs=torch.full((2, 3), -1.0))
    denominators = Denominators(num_sequences=2, num_tokens=4, max_new_tokens=5)
    config = LossConfig(kl=KlConfig(placement="reward"))
    loss, sums = policy_loss(inputs, config, denominators)
    bare, _ = policy_loss(hand_case(), LossConfig(kl=NO_KL), denominators)
    assert loss.item() == bare.item()
    assert sums["kl_loss"] == 0 and sums["kl_sum"] > 0


def test_inputs_are_checked():
    with pytest.raises(ValueError, match="advantages"):
        replace(hand_case(), advantages=torch.zeros(3))
    with pytest.raises(ValueError, match="behaviour_logprobs"):
        replace(hand_case(), behaviour_logprobs=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="mask"):
        replace(hand_case(), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="num_tokens"):
        Denominators(num_sequences=1, num_tokens=-1, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"loss\.kind"):
        policy_loss(
            hand_case(), LossConfig(kind="ppo", kl=NO_KL), Denominators(num_sequences=1, num_tokens=1, max_new_tokens=1)
        )
