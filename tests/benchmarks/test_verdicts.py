"""The benchmarks run, and end with a verdict on their goal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bench_async import figures, verdict
from bench_controller import verdict as controller_verdict
from bench_simulation import conclude


@pytest.mark.parametrize(
    ("per_s", "per_cpu_s", "generators", "expected"),
    [
        (1200, 1500, 256, "256 generators, with Ray's calls: reached, 1,200"),
        (900, 1500, 256, "reached by CPU time, 1,500 a CPU second; by the clock 900"),
        (800, 900, 256, "not reached, 800, and 900 a CPU second"),
        (5000, 5000, 4, "not measured, these were 4"),
    ],
)
def test_the_controller_is_held_against_its_goal(
    per_s: float, per_cpu_s: float, generators: int, expected: str
) -> None:
    assert expected in controller_verdict(per_s, per_cpu_s, generators)


def test_without_ray_the_verdict_says_so() -> None:
    assert "256 generators, without Ray's calls: reached, 5,000" in controller_verdict(5000, 5000, 256, with_ray=False)


def test_the_worst_prediction_decides() -> None:
    assert "reached, at most 14.0% off (max_staleness 1)" in conclude({0: 0.95, 1: 1.14})
    assert "not reached, at most 16.0% off (max_staleness 2)" in conclude({0: 1.0, 2: 0.84})


def test_each_goal_of_asynchronous_training_is_judged_by_the_means_of_all_steps() -> None:
    other = {"seconds": 0.5, "seconds/loop_cpu": 0.02, "seconds/driver_cpu": 0.1, "num_tokens": 9.0}
    steps = [
        {**other, "seconds/step": step_s, "seconds/rollout_busy": 1.0, "seconds/sync_blocked": 0.06}
        for step_s in (1.0, 1.0, 1.6)
    ]
    cells = figures(steps, [{**steps[0], "seconds/step": 2.0}])
    assert (cells["overlap"], cells["speed-up"]) == pytest.approx((1.2, 2 / 1.2)), "the median step is 1"
    overlap, speed_up, loop, sync = verdict({0: {**cells, "overlap": 1.99}, 2: cells}).splitlines()
    assert overlap == "overlap, at most 1.15: not reached with max_staleness 2 (1.20)"
    assert "at least 1.50: reached with max_staleness 2 (1.67)" in speed_up
    assert "at most 3.0%: reached with max_staleness 2 (1.7%)" in loop
    assert "at most 50.0: not reached with max_staleness 2 (60.0)" in sync


def test_the_controller_s_benchmark_runs() -> None:
    given = ["--in-process", "--generators", "4", "--scorers", "2", "--groups", "8", "--steps", "5"]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("bench_controller.py"), *given],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not measured, these were 4" in done.stdout.splitlines()[-1]
