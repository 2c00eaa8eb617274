"""Quantiles of importance ratios from counts that add up."""

import math

import numpy as np
import pytest
import torch

from medtvt_rl.algorithm.ratio_histogram import NUM_BINS, ratio_histogram, ratio_quantile


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_right_to_half_a_bin(share):
    log_ratios = torch.randn(3217, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = np.quantile(log_ratios.exp().numpy(), share, method="inverted_cdf")
    assert ratio_quantile(ratio_histogram(log_ratios), share) == pytest.approx(exact, rel=0.00502)


def test_the_hundredth_of_a_hundred_is_not_the_99th():
    log_ratios = torch.tensor([0.0] * 99 + [3.0])
    assert ratio_quantile(ratio_histogram(log_ratios), 0.99) == 1.0
    assert ratio_quantile(ratio_histogram(log_ratios[1:]), 0.99) == pytest.approx(math.exp(3.0))


def test_counts_add_up_and_nothing_is_lost_at_the_ends():
    log_ratios = torch.tensor([-1e6, -20.0, 0.0, 1e-7, 0.3, 20.0, math.inf])
    whole = ratio_histogram(log_ratios)
    parts = ratio_histogram(log_ratios[:3]) + ratio_histogram(log_ratios[3:]) + ratio_histogram(log_ratios[:0])
    assert whole.shape == (NUM_BINS,) and whole.dtype == torch.float64
    assert whole.tolist() == parts.tolist() and whole.sum() == 7
    assert whole[0] == whole[-1] == 2 and whole[NUM_BINS // 2] == 2


def test_nothing_counted_is_ratio_one():
    assert ratio_quantile(torch.zeros(NUM_BINS), 0.99) == 1.0
