"""The elastic policy drives the simulated run: it converges, keeps still, and answers to a loss and a slow-down."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from timing_models import timings

from medtvt_rl.config import Config
from medtvt_rl.rollout.config import ElasticConfig
from medtvt_rl.rollout.elastic import ElasticPolicy, Signals
from medtvt_rl.simulation.world import setting_of
from pipelines.simulation import Outcome, simulate

LOW, HIGH = 1, 16
# An engine makes one group of two at a time, in some 0.5 s: the 8 groups of a step in 4 s. The learner takes 1 s.
MODEL = timings(learner_step_s=1.0, lengths=((40, 45, 50, 55, 45, 50, 60, 55), (50,) * 8))


def run(generators: int, steps: int = 900, **changes: Any) -> Outcome:
    config = Config()
    config.grpo.max_staleness, config.grpo.groups_per_step, config.grpo.group_size = 2, 8, 2
    config.grpo.loss.kl.coefficient = 0.0
    config.rollout.engine.max_num_seqs, config.rollout.min, config.rollout.max = 2, LOW, HIGH
    slower = changes.pop("slower", None)
    setting = replace(setting_of(config, generators), **changes)
    policy = ElasticPolicy(ElasticConfig(window_s=60.0, cooldown_s=60.0), LOW, HIGH)
    return simulate(config, setting, MODEL, steps, policy, slower)


def test_no_policy_goes_beyond_the_bounds() -> None:
    class Always:
        def __init__(self, wish: int) -> None:
            self.wish = wish

        def decide(self, now: float, signals: Signals) -> int:
            return self.wish

    config = Config()
    config.grpo.groups_per_step, config.rollout.min, config.rollout.max = 4, 2, 4
    for wish, end in ((1, 4), (-1, 2)):
        found = simulate(config, setting_of(config, 3), MODEL, 60, Always(wish))
        assert counts(found) == [3, end], found.generators


def counts(outcome: Outcome) -> list[int]:
    return [count for _, count in outcome.generators]


@pytest.mark.parametrize("generators", [1, 12])
def test_it_converges_to_what_the_learner_needs_and_stays(generators: int) -> None:
    found = run(generators)
    last_at, last = found.generators[-1]
    assert 4 <= last <= 6, found.generators
    assert last_at < 0.6 * found.ends[-1], "the last change is long past"
    steps = {after - before for before, after in pairwise(counts(found))}
    assert steps == ({1} if generators < last else {-1}), "straight to the goal, without a turn back"
    late = [after - before for before, after in pairwise(found.ends[-200:-5])]
    assert sum(late) / len(late) == pytest.approx(1.1, rel=0.1), "the learner's own time"


def test_a_loss_for_good_is_made_up_for() -> None:
    found = run(5, lost=((4, 300.0, None), (3, 300.0, None)))
    assert counts(found)[:3] == [5, 4, 3]
    assert 4 <= counts(found)[-1] <= 6 and len(counts(found)) <= 6, found.generators


def test_a_slow_down_brings_more_and_only_so_many() -> None:
    found = run(5, slower=(200.0, 2.0))
    assert 8 <= counts(found)[-1] <= 12, found.generators
    ups = [after - before for before, after in pairwise(counts(found))]
    assert all(step == 1 for step in ups), found.generators
