"""The real loop on the simulated clock: step times that can be worked out by hand, staleness, stragglers, losses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from timing_models import timings

from medtvt_rl.config import Config
from medtvt_rl.simulation.clock import run_simulated
from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.formulas import best_ratio
from medtvt_rl.simulation.generators import Driver, SimulatedGenerators
from medtvt_rl.simulation.timings import Timings
from medtvt_rl.simulation.world import Setting, setting_of
from medtvt_rl.types import Prompt
from pipelines.simulation import Outcome, simulate


def config(max_staleness: int) -> Config:
    made = Config()
    made.grpo.max_staleness, made.grpo.groups_per_step = max_staleness, 16
    made.grpo.loss.kl.coefficient = 0.0
    return made


def run(max_staleness: int, model: Timings | None = None, generators: int = 1, **changes: Any) -> Outcome:
    made = config(max_staleness)
    setting: Setting = replace(setting_of(made, generators), **changes)
    return simulate(made, setting, model or timings(), 10)


def test_on_policy_a_step_is_the_sum_of_its_parts() -> None:
    # 16 groups of 8 fill the engine: 50 tokens of 10 ms; then the last reward; then the learner's second.
    found = run(0, timings(reward_s=1e-6))
    assert found.step_s == pytest.approx(1.5, rel=1e-3)
    assert (found.staleness, found.max_staleness) == (0.0, 0)
    assert found.generator_idle == pytest.approx(2 / 3, abs=0.01) and found.learner_idle == pytest.approx(
        1 / 3, abs=0.01
    )
    assert found.groups_per_s == pytest.approx(16 / 1.5, rel=1e-3)
    assert found.tokens_per_s == pytest.approx(16 * 400 / 1.5, rel=1e-3)


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_with_staleness_a_step_takes_what_the_slower_role_takes(max_staleness: int) -> None:
    fast = run(max_staleness, timings(reward_s=1e-6))
    assert fast.step_s == pytest.approx(1.0, rel=0.01) and fast.learner_waits < 0.02
    assert fast.max_staleness <= max_staleness and fast.bottleneck == "learners"
    slow = run(max_staleness, timings(reward_s=1e-6, learner_step_s=0.1))
    assert slow.step_s == pytest.approx(0.5, rel=0.1) and slow.bottleneck == "generators"
    assert slow.learner_waits > 0.7


def test_roles_that_share_two_cores_slow_each_other_down_only_when_there_are_three() -> None:
    model = timings(reward_s=0.04, learner_step_s=0.5)
    alone, shared = run(2, model), run(2, model, cores=2.0)
    assert alone.step_s == pytest.approx(0.64, rel=0.05), "16 groups one after the other through the scorer"
    work_s = 0.5 + 0.5 + 16 * 0.04
    assert shared.step_s == pytest.approx(max(0.64, work_s / 2), rel=0.25) and shared.step_s > 1.15 * alone.step_s
    assert run(0, model, cores=2.0).step_s == pytest.approx(run(0, model).step_s, rel=0.05)


def test_generators_beyond_those_that_get_groups_bring_nothing() -> None:
    # Four at a time: one engine needs 2 s for 16 groups of which each takes 0.5 s.
    made = config(1)
    made.rollout.engine.max_num_seqs = 32
    model = timings(learner_step_s=0.2)

    def step_s(generators: int) -> float:
        return simulate(made, setting_of(made, generators), model, 10).step_s

    assert step_s(1) == pytest.approx(2.0, rel=0.05)
    assert step_s(2) == pytest.approx(1.0, rel=0.05)
    assert step_s(4) == pytest.approx(0.5, rel=0.1)
    assert step_s(64) == pytest.approx(step_s(32), rel=0.02)


@pytest.mark.parametrize(
    ("max_staleness", "balance", "by_speed"),
    [(1, "auto", True), (1, "speed", True), (1, "even", False), (0, "auto", False), (0, "speed", True)],
)
def test_a_straggler_costs_what_the_balance_of_the_run_lets_it_cost(
    max_staleness: int, balance: Literal["auto", "speed", "even"], by_speed: bool
) -> None:
    made = config(max_staleness)
    made.rollout.engine.max_num_seqs, made.rollout.balance = 32, balance
    setting, model = setting_of(made, 4), timings(learner_step_s=0.0)
    usual = simulate(made, setting, model, 40).step_s
    cost = simulate(made, replace(setting, straggler=5.0), model, 40).step_s / usual
    # Alike, every step waits for a quarter of the work at a fifth of the speed.
    assert 1.25 < cost < 3.5 if by_speed else cost == pytest.approx(5.0, rel=0.05)


def test_of_unlike_generators_the_slowest_leaves() -> None:
    async def main() -> list[float]:
        made, cores = config(1), Cores()
        setting = replace(setting_of(made, 3), straggler=5.0)
        pool = SimulatedGenerators(made, setting, timings(), cores, Driver(timings(), cores))
        prompt = Prompt(prompt_id="p", token_ids=np.zeros(1, dtype=np.int32), item_id=None, ground_truth="")
        await pool.add(start_s=0.0)
        await asyncio.gather(*(pool.generate(prompt, number, 8) for number in range(8)))
        pool.remove()
        # What is slow is gone: the groups of all that are left take a group's own time.
        made_in = await asyncio.gather(*(pool.generate(prompt, number, 8) for number in range(8, 14)))
        pool.stop()
        return [header.generate_s for header, _ in made_in]

    assert run_simulated(main()) == pytest.approx([0.5] * 6)


def test_a_loss_ends() -> None:
    made = config(1)
    made.rollout.engine.max_num_seqs = 32
    model = timings(learner_step_s=0.2)
    setting = setting_of(made, 4)
    lost = simulate(made, replace(setting, lost=((3, 3.0, 6.0),)), model, 60)
    whole = simulate(made, setting, model, 60)
    assert lost.again > 0
    assert [count for _, count in lost.generators] == [4, 3, 4]
    assert lost.generators[-1][0] == pytest.approx(6.0 + model.start_s)
    assert 1.0 < lost.ends[-1] - whole.ends[-1] < 3.0 + model.start_s


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_generator_that_is_lost_at_once_is_waited_for(max_staleness: int) -> None:
    found = run(max_staleness, timings(start_s=5.0), lost=((0, 2.4, 3.0),))
    assert [count for _, count in found.generators] == [1, 0, 1]


def test_the_formula_of_the_best_ratio_agrees_with_the_simulation() -> None:
    made = config(2)
    made.rollout.engine.max_num_seqs = 8
    model = timings(learner_step_s=0.0, learner_token_s=2.0 / (16 * 410))  # 2 s a step; a generator makes 16 in 8 s
    ratio = best_ratio(made, model, 16)
    assert ratio == pytest.approx(4.0, rel=0.05)
    enough = simulate(made, setting_of(made, round(ratio * 1.25)), model, 20).step_s
    few = simulate(made, setting_of(made, round(ratio * 0.5)), model, 20).step_s
    assert enough == pytest.approx(2.0, rel=0.1) and few > 1.7 * enough


def test_a_thousand_generators_cost_the_driver_what_they_ask_of_it() -> None:
    model = timings(driver_call_s=0.001)
    few, many = run(1, model, 4), run(1, model, 1000)
    assert few.driver_idle > 0.9 and many.bottleneck == "driver"
    assert many.step_s > few.step_s
