"""Calibration against the curve that scikit-learn 1.9.1 gives, and the error by hand."""

import numpy as np
import pytest

from medtvt_rl.evaluation.calibration import calibration_error, reliability


def case(samples: int, n: int = 80):
    generator = np.random.default_rng(3)
    truth = generator.random((n, 3)) < [0.5, 0.2, 0.7]
    return generator.binomial(samples, 0.2 + 0.6 * truth) / samples, truth


def test_bins_agree_with_scikit_learn():
    shares, truth = case(samples=64)
    # scikit-learn's bins are closed above, these below: shares of 64 samples fall on an edge at 0.5 and 1 alone
    edges = np.isclose(shares * 10, np.round(shares * 10))
    shares = np.where(edges & (shares < 1), shares + 1e-9, shares)
    bins = reliability(shares, truth, 50, 0)
    said = [0.0885416667, 0.1610576923, 0.2312011719, 0.3203125, 0.6875, 0.7647879464, 0.8444010417, 0.921875]
    assert [b.said for b in bins] == pytest.approx(said, abs=1e-8)
    assert [b.observed.value for b in bins] == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1])
    assert sum(b.pairs for b in bins) == truth.size


def test_a_few_samples_have_a_bin_for_each_share():
    shares, truth = case(samples=4)
    bins = reliability(shares, truth, 50, 0)
    assert [b.said for b in bins] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for one in bins:
        there = truth[shares == one.said]
        assert one.pairs == there.size and one.observed.value == pytest.approx(there.mean())
        assert one.observed.low <= one.observed.value <= one.observed.high


def test_the_error_by_hand():
    shares = np.array([[0.0], [0.5], [0.5], [1.0]])
    truth = np.array([[False], [True], [True], [False]])
    measure = calibration_error(shares, truth)
    # 0: right. 0.5: said 0.5, observed 1, two pairs. 1: said 1, observed 0, one pair.
    assert float(measure.statistic(measure.rows.sum(0))) == pytest.approx((0 + 2 * 0.5 + 1 * 1.0) / 4)


def test_one_who_knows_what_it_does_not_know_has_no_error():
    generator = np.random.default_rng(0)
    shares = generator.integers(0, 5, (20_000, 1)) / 4
    truth = generator.random(shares.shape) < shares
    measure = calibration_error(shares, truth)
    assert float(measure.statistic(measure.rows.sum(0))) < 0.01


def test_a_resample_equals_the_error_of_the_resampled_studies():
    shares, truth = case(samples=4, n=30)
    measure = calibration_error(shares, truth)
    chosen = np.random.default_rng(1).integers(0, 30, 30)
    weights = np.bincount(chosen, minlength=30)
    again = calibration_error(shares[chosen], truth[chosen])
    assert float(measure.statistic(weights @ measure.rows)) == pytest.approx(
        float(again.statistic(again.rows.sum(axis=0)))
    )


def test_several_studies_of_one_patient_widen_the_interval():
    shares, truth = np.full((80, 1), 0.5), np.repeat(np.arange(20) % 2 == 0, 4)[:, None]
    patients = np.repeat([f"p{i}" for i in range(20)], 4).tolist()
    alone, together = (reliability(shares, truth, 500, 0, clusters)[0].observed for clusters in (None, patients))
    assert together.value == alone.value == 0.5
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
