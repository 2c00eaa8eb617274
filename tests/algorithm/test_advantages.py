"""Advantages against values computed by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.algorithm.advantages import group_advantages, has_signal


def test_group_divides_by_sample_deviation_plus_epsilon():
    # mean 0.5, squared deviations 4 * 0.25, over 3: std = sqrt(1/3) = 0.57735027
    expected = np.array([-0.5, 0.5, -0.5, 0.5]) / (np.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages([0, 1, 0, 1], "group"), expected, atol=1e-6)


def test_mean_only_keeps_the_scale():
    np.testing.assert_allclose(group_advantages([1, 2, 6], "mean_only"), [-2, -1, 3], atol=1e-6)


def test_rloo_subtracts_the_mean_of_the_others():
    # 1 - (2 + 6)/2 = -3; 2 - (1 + 6)/2 = -1.5; 6 - (1 + 2)/2 = 4.5
    np.testing.assert_allclose(group_advantages([1, 2, 6], "rloo"), [-3, -1.5, 4.5], atol=1e-6)


@pytest.mark.parametrize("kind", ["group", "mean_only", "rloo"])
def test_equal_rewards_give_exactly_zero(kind):
    assert not has_signal([0.1 + 0.2, 0.3, 0.3])
    assert (group_advantages([0.1 + 0.2, 0.3, 0.3], kind) == 0).all()
    assert has_signal([0.3, 0.4])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16), st.sampled_from(["group", "mean_only", "rloo"]))
def test_advantages_sum_to_zero_and_keep_the_order(rewards, kind):
    advantages = group_advantages(rewards, kind)
    assert advantages.dtype == np.float32
    assert np.isfinite(advantages).all()
    assert abs(advantages.sum()) < 1e-3
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(advantages[order]) >= -1e-5).all()


@pytest.mark.parametrize("rewards", [[1.0], [], [[1.0, 2.0]], [1.0, float("nan")], [1.0, float("inf")]])
def test_rejects_what_has_no_baseline(rewards):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(rewards, "group")


def test_rejects_an_unknown_kind():
    with pytest.raises(ValueError, match="rloo"):
        group_advantages([0, 1], "batch")
