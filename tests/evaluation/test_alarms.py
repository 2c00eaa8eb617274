"""One test for each sickness: it sounds, once, and again after it had ended; and silence on a healthy run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.evaluation.config import AlarmConfig

HEALTHY = {
    "importance_ratio_p99": 1.05,
    "ess_share": 0.99,
    "entropy": 0.15,
    "groups/zero_variance_share": 0.1,
    "length/mean": 53.0,
    "length/cut_share": 0.01,
    "sync_gap_max": 2e-6,
}
FIRST = [HEALTHY] * 10


def sounds(steps: Sequence[dict[str, float]], config: AlarmConfig | None = None) -> dict[int, list[str]]:
    """The lines of each step that had any."""
    alarms = Alarms(config or AlarmConfig())
    lines = {step: alarms.check(step, metrics) for step, metrics in enumerate(steps)}
    return {step: said for step, said in lines.items() if said}


def sick(**values: float) -> dict[str, float]:
    return {**HEALTHY, **{name.replace("__", "/"): value for name, value in values.items()}}


@pytest.mark.parametrize(
    ("values", "seen", "threshold", "mend"),
    [
        ({"importance_ratio_p99": 2.5}, "importance_ratio_p99 is 2.5", "above 2 (alarms.max_ratio_p99)", "staleness"),
        ({"ess_share": 0.31}, "ess_share is 0.31", "below 0.5 (alarms.min_ess_share)", "grpo.max_staleness"),
        ({"entropy": 0.04}, "entropy is 0.04", "below 0.3 (alarms.min_entropy_share) of 0.15", "kl.coefficient"),
        ({"length__mean": 120.0}, "length/mean is 120", "2 times (alarms.max_length_factor) the 53", "journal/"),
        ({"length__cut_share": 0.4}, "length/cut_share is 0.4", "above 0.3 (alarms.max_cut_share)", "max_new_tokens"),
        ({"sync_gap_max": 3e-3}, "sync_gap_max is 0.003", "above 0.0001 (alarms.max_sync_gap)", "learner.dtype"),
        ({"sync_gap_max": math.inf}, "sync_gap_max is inf", "above 0.0001 (alarms.max_sync_gap)", "learner.dtype"),
    ],
)
def test_a_sickness_sounds_once_and_again_after_it_had_ended(
    values: dict[str, float], seen: str, threshold: str, mend: str
) -> None:
    ill = sick(**values)
    said = sounds([*FIRST, ill, ill, ill, HEALTHY, HEALTHY, ill, ill])
    assert list(said) == [10, 15]
    for step, lines in said.items():
        (line,) = lines
        assert line.startswith(f"step {step}: ") and "\n" not in line
        assert seen in line and threshold in line and mend in line


def test_equal_groups_sound_after_so_many_steps_in_a_row() -> None:
    equal = sick(groups__zero_variance_share=0.9)
    said = sounds([*[equal] * 4, HEALTHY, *[equal] * 8, HEALTHY, *[equal] * 5])
    assert list(said) == [9, 18]
    assert "groups/zero_variance_share is 0.9, above 0.8 (alarms.max_equal_share) for 5 steps" in said[9][0]
    assert "grpo.group_size" in said[9][0]


def test_groups_that_made_way_for_others_count_among_the_equal_ones() -> None:
    kept = sick(groups__zero_variance_share=0.0, groups__trained=4.0, groups__replaced=16.0)
    said = sounds([sick(groups__zero_variance_share=0.0, groups__trained=4.0, groups__replaced=4.0)] * 9)
    assert said == {}
    said = sounds([sick(groups__zero_variance_share=0.5, groups__trained=4.0, groups__replaced=16.0)] * 5)
    assert "with the 16 groups replaced is 0.9, above 0.8 (alarms.max_equal_share)" in said[4][0]
    assert sounds([kept] * 9, AlarmConfig(max_equal_share=0.79)) and not sounds([kept] * 9)


def test_engines_that_sampled_from_another_distribution_sound_though_the_probe_agrees() -> None:
    fresh = {"fresh_tokens": 900.0, "fresh_gap_mean": 0.02, "fresh_gap_max": 4.0}
    said = sounds([HEALTHY, {**HEALTHY, **fresh}, HEALTHY, {**HEALTHY, **fresh, "fresh_gap_max": math.inf}])
    assert "disagree on log-probs: fresh_gap_mean is 0.02, above 0.0001 (alarms.max_sync_gap)" in said[1][0]
    assert "fresh_gap_max is inf" in said[3][0] and list(said) == [1, 3]
    rounding = AlarmConfig(max_sync_gap=0.1)
    assert not sounds([{**HEALTHY, **fresh}], rounding), "the largest of many is large in bfloat16"
    assert sounds([{**HEALTHY, **fresh, "fresh_gap_max": math.inf}], rounding)
    none = {"fresh_tokens": 0.0, "fresh_gap_mean": 0.0, "fresh_gap_max": 0.0}
    ill = {"sync_gap_max": 0.5}
    assert list(sounds([ill, none, ill])) == [0], "no fresh token is no sign of health"


def test_two_signs_of_one_sickness_are_one_line_and_two_sicknesses_are_two() -> None:
    said = sounds([*FIRST, sick(importance_ratio_p99=9.0, ess_share=0.2, entropy=0.01)])
    assert [len(lines) for lines in said.values()] == [2]
    assert "importance_ratio_p99 is 9" in said[10][0] and "ess_share is 0.2" in said[10][0]


def test_an_absent_or_undefined_value_neither_begins_nor_ends_a_sickness() -> None:
    ill, nothing = sick(sync_gap_max=1.0, entropy=0.01), {}
    undefined = sick(sync_gap_max=math.nan, entropy=math.nan)
    assert list(sounds([*FIRST, ill, nothing, undefined, ill, nothing, undefined])) == [10]
    assert sounds([nothing, undefined] * 20) == {}


def test_what_was_first_is_not_judged_by_itself() -> None:
    """A value can be compared with the first steps only after them, however they were spread."""
    assert sounds([sick(entropy=0.15 * 0.5**step) for step in range(10)]) == {}


def test_thresholds_are_those_of_the_configuration() -> None:
    config = AlarmConfig(first_steps=2, max_ratio_p99=math.inf, min_ess_share=0.0, max_sync_gap=0.1)
    assert sounds([*FIRST, sick(importance_ratio_p99=1e8, ess_share=0.0, sync_gap_max=0.05)], config) == {}
    assert list(sounds([HEALTHY, HEALTHY, sick(entropy=0.01)], config)) == [2]


def course(
    rewards: tuple[float, float],
    held_out: dict[str, tuple[float, float]],
    steps: int = 60,
    every: int = 10,
    seed: int = 0,
    noise: float = 0.05,
) -> Iterator[dict[str, float]]:
    """A run whose reward and held-out scores go linearly from the first value to the second."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        done = step / (steps - 1)
        metrics = {"reward/jaccard": rewards[0] + done * (rewards[1] - rewards[0]) + noise * rng.standard_normal()}
        metrics["reward/total"] = metrics["reward/deviation"] = metrics["reward/jaccard"]
        if step % every == 0:
            metrics |= {f"held_out/{name}": a + done * (b - a) for name, (a, b) in held_out.items()}
        yield metrics


@pytest.mark.parametrize("name", ["jaccard", "findings_f1_ecg", "findings_f1_cxr", "findings_f1_lab"])
def test_a_reward_that_rises_while_held_out_quality_falls_sounds(name: str) -> None:
    said = sounds(list(course((1.0, 1.5), {name: (0.9, 0.7)})), AlarmConfig(max_findings_fall=math.inf))
    # It falls by 0.034 every 10 steps; of single measurements 0.05 * sqrt(5) counts.
    assert list(said) == [40]
    assert "reward/jaccard rose from" in said[40][0] and "since step 0" in said[40][0]
    assert f"held_out/{name} fell from 0.9 to 0.7644, by more than 0.1118 (alarms.max_fall)" in said[40][0]
    assert "reward/total" not in said[40][0] and "reward/deviation" not in said[40][0]


def test_held_out_quality_that_recovers_and_falls_again_sounds_again() -> None:
    metrics = list(course((1.0, 1.5), {"jaccard": (0.7, 0.7)}, steps=71))
    for step, value in ((20, 0.55), (30, 0.55), (40, 0.69), (50, 0.64), (60, 0.5)):
        metrics[step]["held_out/jaccard"] = value
    assert list(sounds(metrics)) == [20, 60]


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_first_improves_and_is_then_hacked_sounds(seed: int) -> None:
    """It ends with the scores that it began with."""
    better, rng = {"jaccard": (0.45, 0.7), "findings_f1_ecg": (0.7, 0.95)}, np.random.default_rng(seed)
    worse = {name: (high, low) for name, (low, high) in better.items()}
    metrics = [*course((1.0, 1.4), better, 60, seed=seed), *course((1.4, 2.0), worse, 91, seed=seed)]
    for row in metrics:
        row |= {k: v + 0.012 * rng.standard_normal() for k, v in row.items() if k.startswith("held_out/")}
    said = sounds(metrics)
    lines = [line for step in said for line in said[step]]
    assert min(said) > 60 and sorted(line.split(": ")[1] for line in lines) == [
        "the reasoning rots",
        "the reward rises while held-out quality falls",
    ]
    hacked = next(line for line in lines if "the reward rises" in line)
    assert "reward/jaccard rose from" in hacked and "(means of " in hacked
    assert 40 <= int(hacked.split(" since step ")[1].split(",")[0]) <= 90, "not since the first measurement"


@pytest.mark.parametrize("seed", range(10))
def test_fifty_noisy_measurements_beside_a_rising_reward_are_silent(seed: int) -> None:
    """The highest of fifty, less the latest, is up to 4.5 deviations by chance alone."""
    flat = {"jaccard": (0.58, 0.58), "findings_f1_ecg": (0.95, 0.95), "findings_f1_lab": (0.87, 0.87)}
    metrics, rng = list(course((1.0, 1.5), flat, steps=500, seed=seed)), np.random.default_rng(seed)
    for row in metrics:
        row |= {k: v + 0.02 * rng.standard_normal() for k, v in row.items() if k.startswith("held_out/")}
    assert sounds(metrics) == {}


@pytest.mark.parametrize(
    ("rewards", "held_out"),
    [
        ((1.0, 1.5), {"jaccard": (0.6, 0.7), "findings_f1_ecg": (0.95, 0.92)}),
        ((1.0, 1.0), {"jaccard": (0.7, 0.3)}),
        ((1.5, 1.0), {"jaccard": (0.7, 0.3)}),
        ((1.0, 1.5), {}),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_rise_or_a_fall_alone_is_silent(
    rewards: tuple[float, float], held_out: dict[str, tuple[float, float]], seed: int
) -> None:
    # A flat reward crosses two standard errors now and then, so it is held to four here.
    assert sounds(list(course(rewards, held_out, seed=seed)), AlarmConfig(noise_deviations=4.0)) == {}


def test_a_reward_that_is_constant_has_not_risen() -> None:
    assert sounds(list(course((0.1, 0.1), {"jaccard": (0.7, 0.3)}, noise=0.0))) == {}


def test_findings_that_are_no_longer_those_of_the_data_sound_whatever_the_reward_does() -> None:
    said = sounds(list(course((1.0, 1.0), {"findings_f1_lab": (0.9, 0.7), "findings_f1_ecg": (0.95, 0.9)}, noise=0.0)))
    assert list(said) == [30], "it falls by 0.068 to step 20 and by 0.102 to step 30"
    assert "the reasoning rots: held_out/findings_f1_lab fell from 0.9 to 0.7983, by more than 0.1" in said[30][0]
    assert "ecg" not in said[30][0]


def test_held_out_scores_without_rewards_are_silent() -> None:
    assert sounds([{"held_out/jaccard": 0.9 - 0.1 * step} for step in range(8)]) == {}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_silent(seed: int) -> None:
    rng, steps = np.random.default_rng(seed), 200
    metrics = list(course((1.5, 1.7), {"jaccard": (0.58, 0.6), "findings_f1_ecg": (0.95, 0.94)}, steps, 20, seed))
    walk = np.cumsum(rng.standard_normal(steps)) * 0.0005
    for step, values in enumerate(metrics):
        values |= {
            "importance_ratio_p99": 1.05 + 0.02 * abs(rng.standard_normal()),
            "ess_share": 1 - 0.01 * abs(rng.standard_normal()),
            "entropy": 0.15 - 0.02 * step / steps + walk[step],
            "groups/zero_variance_share": rng.binomial(16, 0.1) / 16,
            "length/mean": 53 + 3 * rng.standard_normal(),
            "length/cut_share": rng.binomial(128, 0.005) / 128,
            "sync_gap_max": 2e-6 * math.exp(0.7 * rng.standard_normal()),
        }
        values |= {k: v + 0.012 * rng.standard_normal() for k, v in values.items() if k.startswith("held_out/")}
    assert sounds(metrics) == {}


def test_a_recorded_run_whose_reasoning_rotted_sounds_while_its_answers_look_well() -> None:
    """Real metrics, as tests/benchmarks/bench_reward_hacking.py writes them: no KL term, a high learning rate."""
    rows = json.loads((Path(__file__).parent / "reasoning_rots.json").read_text())
    measured = [row for row in rows if "held_out/version" in row]
    assert abs(measured[-1]["held_out/jaccard_greedy"] - measured[0]["held_out/jaccard_greedy"]) < 0.01
    assert measured[-1]["held_out/jaccard"] > measured[0]["held_out/jaccard"]
    assert measured[-1]["held_out/findings_f1_lab"] < 0.1 < 0.8 < measured[0]["held_out/findings_f1_lab"]
    said = sounds(rows)
    assert list(said) == [15, 21, 34]
    assert "the reasoning rots: held_out/findings_f1_lab fell from 0.8741 to 0.7725" in said[15][0]
    # The reward rises over the first third alone, by little more than its noise; the findings fall by far more.
    assert "the reward rises while held-out quality falls: reward/jaccard rose from 0.5862 to 0.6305" in said[21][0]
    assert "since step 9, while held_out/findings_f1_lab fell from 0.8741 to 0.7202" in said[21][0]
    assert "answers run away in length" in said[34][0]
