"""What shapes a reward before the advantages, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from medtvt_rl.algorithm.config import GrpoConfig, KlConfig, LossConfig, OverlongConfig
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import GroupHeader, ReferenceHeader
from pipelines.grpo_roles import FinishedGroup
from pipelines.step_metrics import rollout_metrics
from pipelines.training_groups import with_advantages

REWARDS, LENGTHS, KL = [1.0, 0.0], (10, 4), [3.0, 1.0]


def finished(rewards: Sequence[float] = REWARDS) -> FinishedGroup:
    total = np.array(rewards, np.float32)
    header = GroupHeader(
        group_id=0, prompt_id="p", lengths=LENGTHS, num_cut=0, oldest_version=0, newest_version=0, generate_s=0.1
    )
    return FinishedGroup(
        header=header,
        payload=None,
        rewards=GroupRewards(
            components={"jaccard": total}, total=total, failed=np.zeros(2, bool), reasons=(None, None)
        ),
        reference=None,
        reference_header=ReferenceHeader(kl=np.array(KL, np.float32), seconds=0.1),
    )


@pytest.mark.parametrize(
    ("placement", "overlong", "shaped"),
    [
        ("loss", 0.0, [1.0, 0.0]),
        ("reward", 0.0, [1.0 - 0.25 * 3, 0.0 - 0.25 * 1]),
        # Ten of ten tokens with a buffer of five: the whole penalty of 1.
        ("loss", 0.5, [1.0 - 0.5, 0.0]),
        ("reward", 0.5, [1.0 - 0.5 - 0.75, 0.0 - 0.25]),
    ],
)
def test_kl_and_length_are_taken_off_the_reward_before_the_mean(
    placement: str, overlong: float, shaped: list[float]
) -> None:
    config = GrpoConfig(
        advantage="mean_only",
        loss=LossConfig(kl=KlConfig(coefficient=0.25, placement=placement)),  # type: ignore[arg-type]
        overlong=OverlongConfig(weight=overlong, buffer_tokens=5),
    )
    found = with_advantages(finished(), config, max_new_tokens=10)
    np.testing.assert_allclose(found.advantages, np.array(shaped) - np.mean(shaped), atol=1e-6)
    assert found.group.rewards.total.tolist() == REWARDS, "the reward that is reported is the one that was scored"


@pytest.mark.parametrize(("overlong", "share"), [(0.0, 1.0), (0.5, 0.0)])
def test_a_group_of_equal_rewards_that_shaping_tells_apart_teaches_something(overlong: float, share: float) -> None:
    config = GrpoConfig(overlong=OverlongConfig(weight=overlong, buffer_tokens=5))
    found = with_advantages(finished([1.0, 1.0]), config, max_new_tokens=10)
    metrics = rollout_metrics([found], 3)
    assert metrics["groups/zero_variance_share"] == share and metrics["groups/trained"] == 1
    assert metrics["reward_equal_groups/jaccard"] == 1
