"""Work in proportion to speed, against a clock that the test moves: shares, strangers, one that is far slower."""

from __future__ import annotations

import heapq

import pytest

from medtvt_rl.rollout.balance import Balance


def work(speeds: dict[int, float], groups: int, at_once: int, by_speed: bool = True) -> tuple[Balance, list[int]]:
    """Hands out groups of 8 completions of 10 tokens, `at_once` under way at any time; a generator shares its speed
    among those it makes. Returns who got each."""
    now = 0.0
    balance = Balance(by_speed, lambda: now)
    loads = dict.fromkeys(speeds, 0)
    under_way: list[tuple[float, int, int]] = []
    free_at = dict.fromkeys(speeds, 0.0)
    got = []
    for number in range(groups):
        if len(under_way) == at_once:
            now, _, index = heapq.heappop(under_way)
            loads[index] -= 8
            balance.end(index, 80)
        index = balance.order(loads, 8)[0]
        balance.begin(index)
        loads[index] += 8
        free_at[index] = max(now, free_at[index]) + 80 / speeds[index]
        heapq.heappush(under_way, (free_at[index], number, index))
        got.append(index)
    return balance, got


def test_unlike_generators_get_work_in_proportion_to_their_speed() -> None:
    balance, got = work({0: 100.0, 1: 400.0, 2: 20.0}, groups=2000, at_once=40)
    late = got[400:]
    assert late.count(1) / late.count(0) == pytest.approx(4, rel=0.15)
    assert late.count(0) / late.count(2) == pytest.approx(5, rel=0.25)
    speeds = {share.index: share.tokens_per_s for share in balance.shares()}
    assert speeds == {0: pytest.approx(100, rel=0.1), 1: pytest.approx(400, rel=0.1), 2: pytest.approx(20, rel=0.1)}
    assert sum(share.share for share in balance.shares()) == pytest.approx(1)


def test_like_generators_get_the_same() -> None:
    _, got = work(dict.fromkeys(range(4), 50.0), groups=800, at_once=16)
    assert all(got[200:].count(index) == pytest.approx(150, rel=0.1) for index in range(4))


def test_a_far_slower_one_is_asked_though_the_others_are_never_busy() -> None:
    _, got = work({0: 1000.0, 1: 10.0}, groups=2000, at_once=2)
    assert 5 <= got[200:].count(1) <= 60


def test_one_that_became_faster_is_found_out() -> None:
    now = 0.0
    balance = Balance(True, lambda: now)
    seconds = {0: 1.0, 1: 20.0}
    got = []
    for step in range(1500):
        index = balance.order({0: 0, 1: 0}, 8)[0]
        balance.begin(index)
        now += seconds[index] if step < 200 else 1.0
        balance.end(index, 80)
        got.append(index)
    assert 0 < 3 * got[:200].count(1) < got[-200:].count(1)


def test_without_speed_only_what_is_under_way_counts() -> None:
    balance, _ = work({0: 1.0, 1: 900.0}, groups=50, at_once=4, by_speed=False)
    assert balance.order({0: 8, 1: 8, 2: 0}, 4) == [2, 0, 1] and balance.order({1: 4, 0: 4}, 4) == [0, 1]


def test_who_leaves_is_the_slowest_and_of_equals_the_newest() -> None:
    balance, _ = work({0: 100.0, 1: 10.0, 2: 100.0}, groups=300, at_once=12)
    assert balance.slowest([0, 1, 2]) == 1 and balance.slowest([0]) == 0
    assert balance.slowest([0, 1, 7]) == 7, "one that is not measured"
    assert Balance(False).slowest([0, 1, 2]) == 2


def test_a_successor_counts_as_the_usual_one_until_it_is_measured() -> None:
    balance, _ = work({0: 10.0, 1: 1000.0}, groups=300, at_once=8)
    balance.begin(0)
    balance.end(0, 80)
    assert balance.order({0: 0, 1: 8}, 8)[0] == 1
    balance.started_anew(0)
    assert balance.order({0: 0, 1: 8}, 8)[0] == 0
    assert balance.shares()[0].tokens > 0, "what its predecessor did stays in the sum"
