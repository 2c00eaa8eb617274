"""Actors leave a node that will be taken away: what they have is done, others start elsewhere, learners are kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_generators import PROMPT, Cast
from waiting import until

from actors import drain as drain_module
from actors.drain import SPARED_S, Drain
from actors.supervision import Restarts
from medtvt_rl.config import SupervisionConfig

SETTING = "node b"


class Seats:
    """Two generators, a scorer and two learners on two nodes; a renewed bundle comes to `node c`."""

    def __init__(self) -> None:
        self.nodes = {
            ("rollout", 0): "node a",
            ("rollout", 1): "node b",
            ("reward", 0): "node b",
            ("learner", 0): "node b",
            ("learner", 1): "node b",
        }

    def seats_on(self, node_id: str) -> list[tuple[str, int]]:
        return [seat for seat, node in self.nodes.items() if node == node_id]

    def renew(self, role: str, index: int) -> None:
        self.nodes[role, index] = "node c"


class Moves:
    """A pool that only notes who was to move."""

    def __init__(self, *serving: int) -> None:
        self.serving = list(serving)
        self.moved: list[tuple[int, str, float]] = []

    def move(self, index: int, why: str, timeout_s: float, anew: Any) -> None:
        self.moved.append((index, why, timeout_s))
        anew()


def keep(kept: list[str]) -> bool:
    kept.append("checkpoint")
    return True


def watched(cast: Cast, leaving: dict[str, float], kept: list[str]) -> tuple[Drain, Seats, Moves]:
    seats, scorers = Seats(), Moves(0)
    pools = {"rollout": cast.pool, "reward": scorers, "reference": None}
    told = cast.told.append
    return Drain(pools, seats, lambda: keep(kept), 50.0, told, lambda: dict(leaving)), seats, scorers


def test_a_leaving_node_is_emptied_and_its_work_is_done_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "POLL_S", 0.01)

    async def run() -> None:
        cast, leaving, kept = Cast(tmp_path, 2), {"node of others": 9.0}, []
        drain, seats, scorers = watched(cast, leaving, kept)
        watch = asyncio.create_task(drain.run())
        cast.first[1].gates["generate"].clear()
        groups = [asyncio.create_task(cast.pool.generate(PROMPT, group_id, 4)) for group_id in range(2)]
        await cast.settle()
        leaving["node b"] = 120.0
        await until(lambda: scorers.moved and any("; 1 serve" in line for line in cast.told), cast.told)
        assert scorers.moved == [(0, "it will be taken away in 120 s", 50.0)]
        assert seats.nodes["rollout", 1] == "node b", "it has a group to end"
        assert kept == ["checkpoint"], "once, however many learners sit there"
        assert any("learners will be taken away: a checkpoint follows" in line for line in cast.told)
        await asyncio.gather(*(cast.pool.generate(PROMPT, group_id, 4) for group_id in (2, 3)))
        assert cast.first[1].groups == [1], "it is asked nothing new"
        cast.first[1].gates["generate"].set()
        assert {payload for _, payload in await asyncio.gather(*groups)} == {"0..4 of g0", "0..4 of g1"}
        await until(lambda: cast.pool.num_left == 2, cast.told)
        assert cast.first[1].dead.is_set() and seats.nodes["rollout", 1] == "node c"
        assert cast.told[-1].startswith("rollout 1 serves again")
        assert cast.incidents.metrics()["restarts/rollout"] == 0 and cast.incidents.over[0].outcome == "moved"
        watch.cancel()

    asyncio.run(run())


def test_what_is_not_done_in_time_goes_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "POLL_S", 0.01)

    async def run() -> None:
        cast = Cast(tmp_path, 2)
        drain, _, _ = watched(cast, {"node b": SPARED_S + 0.2}, [])
        cast.first[1].gates["generate"].clear()
        groups = [asyncio.create_task(cast.pool.generate(PROMPT, group_id, 4)) for group_id in range(2)]
        await cast.settle()
        watch = asyncio.create_task(drain.run())
        payloads = [payload for _, payload in await asyncio.wait_for(asyncio.gather(*groups), 20)]
        assert payloads[0] == "0..4 of g0" and payloads[1] in ("0..4 of g0", "0..4 of g1.1")
        watch.cancel()

    asyncio.run(run())


def test_leaving_is_no_restart_that_counts(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, max_restarts=1)
        for _ in range(3):
            cast.pool.move(0, "it will be taken away", 5.0, lambda: None)
            waiting = asyncio.create_task(cast.pool.generate(PROMPT, 1, 4))
            assert "of g0." in (await asyncio.wait_for(waiting, 20))[1]
        assert len(cast.successors[0]) == 3 and cast.pool.serving == [0]

    asyncio.run(run())


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_one_that_moved_has_all_of_its_restarts_left(tmp_path: Path, max_restarts: int) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, max_restarts=max_restarts)
        cast.pool.move(0, "it will be taken away", 5.0, lambda: None)
        await until(lambda: cast.pool.serving == [0, 1], cast.told)
        assert cast.told[-1].startswith("rollout 0 serves again") and cast.incidents.over[0].outcome == "moved"
        for life in range(max_restarts):
            cast.successors[0][-1].dead.set()
            await cast.pool.stats()
            await until(lambda: cast.pool.serving == [0, 1], cast.told)
            assert len(cast.successors[0]) == life + 2
        cast.successors[0][-1].dead.set()
        await cast.pool.stats()
        await cast.settle()
        assert cast.pool.serving == [1] and "given up (supervision.max_restarts" in cast.told[-1]

    asyncio.run(run())


def test_a_start_that_does_not_count_stays_so_where_its_node_goes_meanwhile() -> None:
    restarts = Restarts(SupervisionConfig(max_restarts=0))
    assert not restarts.allowed
    restarts.free()
    for _ in range(2):
        assert restarts.allowed
        restarts.begin()
        assert not restarts.allowed
        restarts.take_back()
