"""Held-out measurements beside the steps: when they start, and that each result is told once."""

from __future__ import annotations

import asyncio

import pytest
from test_grpo_loop import FakeCluster, FakeHeldOut, Told, run_loop

from medtvt_rl.algorithm.config import GrpoConfig, HeldOutConfig
from pipelines.measuring import Measuring, engine_gap


class SlowHeldOut:
    """Measures when it is let; knows how often it was asked."""

    def __init__(self) -> None:
        self.asked, self.may_answer = 0, asyncio.Event()

    async def measure(self) -> dict[str, float]:
        self.asked += 1
        await self.may_answer.wait()
        return {"jaccard": 0.5}


class Run:
    """A run of so many steps, measured now and then; `ready` gives the version that a step's row is told of."""

    def __init__(self, every: int, last: int, max_staleness: int) -> None:
        config = GrpoConfig(steps=last, max_staleness=max_staleness, held_out=HeldOutConfig(every_steps=every))
        self.held_out, self.cluster, self.told = SlowHeldOut(), FakeCluster(), Told()
        self.measuring = Measuring(self.held_out, config, self.cluster, self.told)

    async def answer(self) -> None:
        """What is under way ends, and no more."""
        self.held_out.may_answer.set()
        if self.measuring.task is not None:
            await asyncio.wait({self.measuring.task})
        self.held_out.may_answer.clear()

    async def ready(self, version: int) -> float | None:
        return (await asyncio.wait_for(self.measuring.ready(version), 5)).get("held_out/version")

    @property
    def late(self) -> list[float]:
        return [metrics["held_out/version"] for metrics in self.told.late]


def test_on_policy_every_version_is_measured_and_the_first_has_a_row_of_its_own() -> None:
    async def run() -> None:
        run = Run(every=1, last=3, max_staleness=0)
        run.held_out.may_answer.set()
        await run.measuring.begin(0)
        assert [await run.ready(version) for version in (1, 2, 3)] == [1, 2, 3]
        assert run.late == [0] and list(run.cluster.scores) == [0, 1, 2, 3]

    asyncio.run(run())


def test_one_that_is_done_makes_way_for_the_next_at_once() -> None:
    async def run() -> None:
        run = Run(every=1, last=4, max_staleness=2)
        await run.measuring.begin(0)
        for version in (1, 2, 3):
            await run.answer()
            assert await run.ready(version) == version - 1
        assert run.held_out.asked == 4

    asyncio.run(run())


def test_a_late_one_is_told_and_scored_before_the_last_is_measured() -> None:
    async def run() -> None:
        run = Run(every=2, last=3, max_staleness=2)
        await run.measuring.begin(0)
        await run.answer()
        assert await run.ready(1) == 0 and await run.ready(2) is None
        run.held_out.may_answer.set()
        assert await run.ready(3) == 3
        assert run.late == [2] and run.told.late[0]["held_out/jaccard"] == 0.5
        assert list(run.cluster.scores) == [0, 2, 3]

    asyncio.run(run())


def test_one_that_outlasts_its_turn_is_told_with_the_version_that_it_began_with() -> None:
    async def run() -> None:
        run = Run(every=2, last=9, max_staleness=2)
        await run.measuring.begin(0)
        await run.answer()
        told = [await run.ready(version) for version in range(1, 6)]
        assert told == [0, None, None, None, None] and run.held_out.asked == 2, "4 is not measured: 2 still is"
        assert run.cluster.measuring == 2
        await run.answer()
        assert run.cluster.measuring is None
        assert list(run.cluster.scores) == [0, 2], "told at once, whenever the next step ends"
        assert await run.ready(6) == 2 and run.held_out.asked == 3
        await run.answer()
        assert list(run.cluster.scores) == [0, 2, 6] and run.late == []

    asyncio.run(run())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_every_result_of_a_run_is_told_once(max_staleness: int) -> None:
    cluster, told = FakeCluster(train_s=0.01), Told()
    run_loop(cluster, told, held_out=FakeHeldOut(cluster), max_staleness=max_staleness)
    rows = [metrics["held_out/version"] for metrics in [*told.metrics, *told.late] if "held_out/version" in metrics]
    assert sorted(rows) == sorted(cluster.scores) and {0, 6} <= set(rows)


def test_without_a_probe_no_gap_was_measured() -> None:
    assert asyncio.run(engine_gap(FakeCluster(), None)) is None
