"""The algorithm of docs/reuse.md, against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medtvt_rl.algorithm.advantages import group_advantages
from medtvt_rl.algorithm.config import ImportanceConfig, KlConfig, LossConfig
from medtvt_rl.algorithm.losses import Denominators, LossInputs, policy_loss
from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError, check_config
from pipelines.command import check_named

OWN = LossConfig(
    kind="algorithm:quadratic", kl=KlConfig(coefficient=0), importance=ImportanceConfig(mode="none"), clip_high=0.25
)
RATIOS = torch.tensor([[1.0, 1.5, 7.0], [0.5, 7.0, 7.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
# A = 2: 2 * 1 - 0, 2 * 1.5 - 2 * 0.25 / 0.5; A = -1: -0.5 - 1 * 0.25 / 0.5
OBJECTIVE = [2.0, 2.0, -1.0]


def inputs(rows: slice = slice(None)) -> LossInputs:
    policy = RATIOS.log()[rows].clone().requires_grad_()
    zeros = torch.zeros_like(policy)
    advantages = torch.tensor([2.0, -1.0])[rows]
    return LossInputs(
        policy_logprobs=policy,
        proximal_logprobs=zeros,
        behaviour_logprobs=zeros,
        reference_logprobs=None,
        advantages=advantages,
        mask=MASK[rows],
    )


STEP = Denominators(num_sequences=2, num_tokens=3, max_new_tokens=3)


@pytest.mark.parametrize(
    ("rewards", "expected"), [([0, 5, 1], [-1, 1, 0]), ([2, 2, 9], [-0.5, -0.5, 1]), ([3, 3], [0, 0])]
)
def test_places_take_the_place_of_rewards(written: Path, rewards: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(group_advantages(rewards, "algorithm:by_rank"), expected, atol=1e-6)


def test_the_objective_is_averaged_over_all_tokens_however_the_step_is_cut(written: Path) -> None:
    given = inputs()
    loss, sums = policy_loss(given, OWN, STEP)
    assert loss.item() == pytest.approx(-sum(OBJECTIVE) / 3, abs=1e-6)
    assert sums["num_tokens"] == 3 and sums["clip_high_tokens"] == 1
    parts = [policy_loss(inputs(rows), OWN, STEP)[0].item() for rows in (slice(0, 1), slice(1, 2))]
    assert sum(parts) == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    gradient = given.policy_logprobs.grad
    assert gradient is not None and (gradient[~MASK] == 0).all()
    # d/dr (r A - |A| (r - 1)^2 / 0.5) times r, over the tokens: at r = 1 it is A.
    assert gradient[0, 0].item() == pytest.approx(-2 / 3, abs=1e-6)
    assert gradient[1, 0].item() == pytest.approx(-(-1 + 1 / 0.5 * 0.5 * 2) * 0.5 / 3, abs=1e-6)


def test_the_configuration_takes_it_and_names_a_mistake(written: Path) -> None:
    config = Config()
    config.rewards = {}
    config.run.stages = ["cohort"]
    config.grpo.advantage, config.grpo.loss.kind = "algorithm:by_rank", "algorithm:quadratic"
    check_named(config)
    config.grpo.loss.kind = "algorithm:cubic"
    with pytest.raises(ConfigError, match=r"grpo\.loss\.kind: module 'algorithm' has no 'cubic'"):
        check_named(config)
    config.grpo.loss.kind = "cubic"
    with pytest.raises(ConfigError, match=r"grpo\.loss\.kind is 'cubic': name one of grpo, .*or your own as"):
        check_config(config)


def sums(rewards: np.ndarray) -> float:
    return float(rewards.sum())


def flat(ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return ratio.mean(dim=1)


def test_what_has_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"grpo\.advantage: .*:sums made 3\.0 of .*expected 2 finite"):
        group_advantages([1, 2], f"{__name__}:sums")
    with pytest.raises(ValueError, match=r"grpo\.loss\.kind: .*:flat made \[2\], expected \[2, 3\]"):
        policy_loss(inputs(), LossConfig(kind=f"{__name__}:flat", kl=KlConfig(coefficient=0)), STEP)
