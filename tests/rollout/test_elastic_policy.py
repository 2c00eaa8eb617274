"""The elastic policy: when it adds, removes, and keeps still."""

from __future__ import annotations

from medtvt_rl.rollout.config import ElasticConfig
from medtvt_rl.rollout.elastic import ElasticPolicy, Signals


class Run:
    """Steps of 10 s, told to a policy."""

    def __init__(self, low: int = 1, high: int = 8, **settings: float) -> None:
        config = ElasticConfig(**{"window_s": 60.0, "cooldown_s": 60.0, **settings})  # type: ignore[arg-type]
        self.policy, self.now = ElasticPolicy(config, low, high), 0.0

    def steps(self, count: int, waits: float, idle: float, generators: int, starting: int = 0) -> list[int]:
        found = []
        for _ in range(count):
            self.now += 10.0
            told = Signals(
                seconds=10.0,
                learner_waited_s=10 * waits,
                generator_idle_s=10 * idle,
                generators=generators,
                starting=starting,
            )
            found.append(self.policy.decide(self.now, told))
        return found


def test_one_is_added_while_the_learner_waits_and_not_before_window_and_cool_down_are_over() -> None:
    found = Run().steps(8, waits=0.4, idle=0.0, generators=2)
    assert found == [0, 0, 0, 0, 0, 0, 1, 0]
    assert Run(cooldown_s=200).steps(21, 0.4, 0.0, 2) == [0] * 20 + [1]


def test_nothing_is_decided_while_one_is_on_its_way() -> None:
    run = Run()
    assert run.steps(7, 0.4, 0.0, 2)[-1] == 1
    assert run.steps(30, 0.4, 0.0, 2, starting=1) == [0] * 30
    assert run.steps(8, 0.4, 0.0, 3) == [0, 0, 0, 0, 0, 0, 1, 0]


def test_one_is_removed_only_where_the_others_are_enough() -> None:
    assert -1 in Run().steps(10, waits=0.0, idle=0.5, generators=4)
    assert -1 not in Run().steps(10, waits=0.0, idle=0.35, generators=4), "three would be idle for 13 %"
    assert -1 not in Run().steps(10, waits=0.06, idle=0.5, generators=4), "the learner waits now and then"


def test_between_the_thresholds_nothing_changes() -> None:
    assert Run().steps(50, waits=0.08, idle=0.1, generators=4) == [0] * 50


def test_more_generators_are_no_answer_where_they_are_idle_themselves() -> None:
    assert Run().steps(50, waits=0.4, idle=0.5, generators=4) == [0] * 50


def test_the_bounds_hold() -> None:
    assert Run(high=2).steps(50, 0.9, 0.0, 2) == [0] * 50
    assert Run(low=2).steps(50, 0.0, 0.95, 2) == [0] * 50


def test_fewer_than_the_least_are_replaced_at_once_and_more_than_the_most_leave() -> None:
    assert Run(low=2).steps(1, 0.0, 0.0, 1) == [1]
    assert Run(low=2).steps(1, 0.0, 0.0, 1, starting=1) == [0]
    assert Run(high=3).steps(1, 0.0, 0.0, 4) == [-1]


def test_one_slow_step_in_many_decides_nothing() -> None:
    run = Run(window_s=120.0)
    found = [decision for _ in range(20) for decision in (*run.steps(9, 0.02, 0.05, 2), *run.steps(1, 0.4, 0.0, 2))]
    assert found == [0] * 200


def test_steps_longer_than_the_window_still_need_several() -> None:
    run = Run(window_s=1.0, cooldown_s=0.0)
    assert run.steps(4, 0.5, 0.0, 2) == [0, 0, 0, 1]
