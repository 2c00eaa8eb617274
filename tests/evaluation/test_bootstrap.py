"""Intervals: values by hand, coverage, pairing, and patients with several studies."""

import json

import numpy as np
import pytest

from medtvt_rl.evaluation.bootstrap import (
    Interval,
    Measure,
    bootstrap_mean,
    bootstrap_measures,
    bootstrap_paired_difference,
    mean_measure,
    ratio,
)


def test_mean_and_its_interval_agree_with_theory():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    interval = bootstrap_mean(values, 2000, seed=1)
    assert interval.value == pytest.approx(values.mean(), abs=1e-12)
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_coverage_is_near_95_percent():
    generator = np.random.default_rng(2)
    covered = []
    for seed in range(200):
        interval = bootstrap_mean(generator.random(50) < 0.3, 300, seed)
        covered.append(interval.low <= 0.3 <= interval.high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_the_interval_is_a_function_of_the_seed():
    values = np.arange(20.0)
    assert bootstrap_mean(values, 600, 3) == bootstrap_mean(values, 600, 3)
    assert bootstrap_mean(values, 600, 3) != bootstrap_mean(values, 600, 4)


def test_pairing_removes_the_spread_between_patients():
    generator = np.random.default_rng(4)
    before = generator.normal(0, 10, 100)
    after = before + generator.normal(1.0, 0.1, 100)
    gain = bootstrap_paired_difference(mean_measure(before), mean_measure(after), 500, seed=0)
    assert gain.value == pytest.approx((after - before).mean(), abs=1e-9)
    assert gain.high - gain.low < 0.1


def test_patients_are_resampled_with_all_their_studies():
    generator = np.random.default_rng(5)
    values = np.repeat(generator.normal(0, 1, 60), 4)
    patients = np.repeat([f"p{i}" for i in range(60)], 4).tolist()
    alone = bootstrap_mean(values, 1000, seed=0)
    together = bootstrap_mean(values, 1000, seed=0, clusters=patients)
    assert together.value == pytest.approx(alone.value)
    assert 1.6 < (together.high - together.low) / (alone.high - alone.low) < 2.4


def test_a_study_without_a_value_does_not_count():
    assert bootstrap_mean([1.0, float("nan"), 0.0], 50, seed=0).value == 0.5


def test_statistic_undefined_in_some_resamples_or_all():
    rows = np.array([[1.0, 1.0], [0.0, 0.0]])
    interval = bootstrap_measures({"m": Measure(rows=rows, statistic=ratio)}, 100, 0)["m"]
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)
    nowhere = bootstrap_mean([float("nan")], 10, 0)
    assert np.isnan([nowhere.value, nowhere.low, nowhere.high]).all()
    assert json.dumps(nowhere.to_dict()) == '{"value": null, "low": null, "high": null}'


def test_interval_reads_well():
    assert str(Interval(value=0.5, low=0.41234, high=0.6)) == "0.500 [0.412, 0.600]"


def test_rejects_nonsense():
    with pytest.raises(ValueError, match="no study"):
        bootstrap_mean([], 10, 0)
    with pytest.raises(ValueError, match="bootstrap_resamples: 0"):
        bootstrap_mean([1.0], 0, 0)
    with pytest.raises(ValueError, match="1 for 2 studies"):
        bootstrap_mean([1.0, 2.0], 10, 0, clusters=["p"])
    with pytest.raises(ValueError, match="1 studies before, 2 after"):
        bootstrap_paired_difference(mean_measure([1.0]), mean_measure([1.0, 2.0]), 10, 0)
