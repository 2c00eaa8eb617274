"""The pool against fake generators: who gets the next group, and how a large one is spread over several."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_generators import CHECKSUM, PROMPT, Cast, FakeGenerator
from ray.exceptions import ActorDiedError

from actors.deadline import DeadlineError
from actors.failure import ActorError
from actors.starting import started
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.faults import RoleLostError
from medtvt_rl.rollout.pending import EngineBrokenError


def test_the_generator_with_the_fewest_completions_gets_the_next_group(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        for generator in cast.first:
            generator.gates["generate"].clear()
        tasks = []
        for group_id, num_completions in enumerate((8, 2, 2, 2, 4, 1)):
            tasks.append(asyncio.create_task(cast.pool.generate(PROMPT, group_id, num_completions)))
            await asyncio.sleep(0)
        assert [generator.groups for generator in cast.first] == [[0, 5], [1, 2, 3, 4]]
        for generator in cast.first:
            generator.gates["generate"].set()
        header, payload = await tasks[0]
        assert (header.group_id, payload) == (0, "0..8 of g0")
        await asyncio.gather(*tasks)
        await cast.pool.generate(PROMPT, 6, 8)
        assert cast.first[0].groups[-1] == 6, "finished groups are no load"

    asyncio.run(run())


def test_unlike_generators_get_groups_by_speed_and_their_shares_are_told(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, balance="speed")
        slow, fast = cast.first

        async def work(generator: Any, seconds: float) -> None:
            while True:
                generator.gates["generate"].clear()
                await asyncio.sleep(seconds)
                generator.gates["generate"].set()
                await asyncio.sleep(0)

        workers = [asyncio.create_task(work(slow, 0.04)), asyncio.create_task(work(fast, 0.01))]
        turns = asyncio.Semaphore(1)

        async def one(group_id: int) -> None:
            async with turns:
                await cast.pool.generate(PROMPT, group_id, 4)

        await asyncio.gather(*(one(group_id) for group_id in range(100)))
        for worker in workers:
            worker.cancel()
        shares = cast.pool.shares()
        assert shares[1].groups > 2 * shares[0].groups > 0, shares
        assert shares[0].tokens == 4 * shares[0].groups == 4 * len(slow.groups)
        assert sum(share.share for share in shares) == pytest.approx(1)
        first, second = (share.tokens_per_s or 0 for share in shares)
        assert second > first > 0

    asyncio.run(run())


@pytest.mark.parametrize("fault", [ActorDiedError(), EngineBrokenError("a step of the engine failed")])
def test_without_successors_a_lost_generator_is_left_out(tmp_path: Path, fault: Exception) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3, replace=False)
        pool, lost = cast.pool, cast.first[0]
        lost.fault = fault
        answers = await asyncio.gather(*(pool.generate(PROMPT, group_id, 4) for group_id in range(30)))
        assert {payload for _, payload in answers} == {"0..4 of g1", "0..4 of g2"}
        assert len(cast.told) == 1 and cast.told[0].startswith(f"rollout 0 is lost: {type(fault).__name__}")
        assert cast.told[0].endswith("2 left")
        tried = len(lost.groups)
        await pool.generate(PROMPT, 31, 4)
        await pool.update_weights("weights", 1, CHECKSUM)  # type: ignore[arg-type]
        assert len(await pool.score("group", 0)) == len(await pool.stats()) == pool.num_left == 2  # type: ignore[arg-type]
        assert len(lost.groups) == tried

    asyncio.run(run())


def test_the_last_one_lost_ends_with_role_index_cause_and_log(tmp_path: Path) -> None:
    log = tmp_path / "r" / "logs" / "rollout_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("early\nSegmentation fault in paged attention\n")

    async def run() -> None:
        cast = Cast(tmp_path, 1, max_restarts=0)
        pool: Any = cast.pool
        cast.first[0].fault = EngineBrokenError("it broke")
        calls: list[Awaitable[Any]] = [
            pool.generate(PROMPT, 0, 4),
            pool.update_weights("w", 1, CHECKSUM),
            pool.score("g", 0),
        ]
        for call in calls:
            with pytest.raises(RoleLostError) as raised:
                await call
            assert str(raised.value).startswith("no rollout actor is left; rollout 0 is lost: EngineBrokenError:")
            assert "Segmentation fault in paged attention" in raised.value.incidents[-1].log_tail
        assert "given up (supervision.max_restarts: 0 in 600 s)" in cast.told[0]

    asyncio.run(run())


def test_a_failed_call_and_a_late_one_of_a_busy_generator_leave_it_in_rotation(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, generate_timeout_s=0.05)
        pool, generator = cast.pool, cast.first[0]
        generator.gates["generate"].clear()
        late = asyncio.create_task(pool.generate(PROMPT, 5, 4))
        await asyncio.sleep(0.01)
        await pool.stats()
        with pytest.raises(DeadlineError, match="rollout 0 to generate group 5"):
            await late
        generator.gates["generate"].set()
        generator.fault = ValueError("this prompt does not fit")
        with pytest.raises(ValueError, match="does not fit"):
            await pool.generate(PROMPT, 6, 4)
        assert pool.num_left == 1 and not cast.told

    asyncio.run(run())


def test_a_large_group_is_made_in_parts_and_merged_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3, max_completions_per_engine=4)
        cast.first[0].gates["generate"].clear()
        busy = asyncio.create_task(cast.pool.generate(PROMPT, 1, 4))
        await cast.settle()
        header, payload = await cast.pool.generate(PROMPT, 2, 8)
        assert payload == "0..4 of g1 + 4..8 of g2" and header.generate_s == 1.0
        cast.first[0].gates["generate"].set()
        await busy
        _, payload = await cast.pool.generate(PROMPT, 3, 100)
        assert payload == "0..33 of g0 + 33..66 of g1 + 66..100 of g2", "never more parts than generators"
        _, payload = await cast.pool.generate(PROMPT, 4, 4)
        assert payload == "0..4 of g0", "one share is not split"

    asyncio.run(run())


@pytest.mark.parametrize(("setting", "whole"), [(0, True), (None, False)])
def test_never_split_and_the_share_that_an_engine_can_compute_at_once(
    tmp_path: Path, setting: int | None, whole: bool
) -> None:
    async def run() -> None:
        settings: Any = {"max_completions_per_engine": setting}
        cast = Cast(tmp_path, 2, **settings)
        await cast.pool.generate(PROMPT, 0, 128)
        await cast.pool.generate(PROMPT, 1, 129)
        assert cast.first[0].parts == ([(0, 0, 128), (1, 0, 129)] if whole else [(0, 0, 128), (1, 0, 64)])
        assert cast.first[1].parts == ([] if whole else [(1, 64, 65)])

    asyncio.run(run())


def test_only_the_part_of_a_lost_generator_is_made_again(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, max_completions_per_engine=4)
        cast.prepare = lambda successor: successor.gates["start"].clear()
        for generator in cast.first:
            generator.gates["generate"].clear()
        group = asyncio.create_task(cast.pool.generate(PROMPT, 7, 7))
        await cast.settle()
        cast.first[1].dead.set()
        await cast.settle()
        assert cast.first[0].parts == [(7, 0, 3), (7, 3, 4)] and cast.first[1].parts == [(7, 3, 4)]
        cast.first[0].gates["generate"].set()
        _, payload = await group
        assert payload == "0..3 of g0 + 3..7 of g0"

    asyncio.run(run())


def test_parts_are_merged_elsewhere_where_the_merging_generator_is_lost(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, max_completions_per_engine=4)
        cast.first[0].gates["merge"].clear()
        group = asyncio.create_task(cast.pool.generate(PROMPT, 7, 8))
        await cast.settle()
        cast.first[0].dead.set()
        _, payload = await group
        assert payload == "0..4 of g0 + 4..8 of g1"
        assert [len(generator.parts) for generator in cast.first] == [1, 1]

    asyncio.run(run())


def test_a_group_that_a_dead_node_cannot_hand_over_is_made_by_another(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)

        async def keep(payload: str) -> str:
            if payload.endswith("g0"):
                cast.first[0].dead.set()
                await asyncio.Event().wait()
            return f"{payload}, kept"

        cast.pool._keep = keep
        group = asyncio.create_task(cast.pool.generate(PROMPT, 0, 4))
        await cast.settle()
        await cast.pool.stats()  # the next call finds out that the generator has died
        assert (await group)[1] == "0..4 of g1, kept"

    asyncio.run(run())


def test_every_engine_scores(tmp_path: Path) -> None:
    async def run() -> None:
        pool: Any = Cast(tmp_path, 3).pool
        assert all(np.array_equal(scored, np.zeros(2)) for scored in await pool.score("group", 0))

    asyncio.run(run())


def test_groups_of_a_wave_have_their_generators_before_they_are_asked_for(tmp_path: Path) -> None:
    async def run(order: list[int]) -> tuple[list[list[tuple[int, int, int]]], list[list[Any]]]:
        cast = Cast(tmp_path, 2, max_completions_per_engine=6)
        cast.pool.together([4, 5, 6], 8)
        answers = await asyncio.gather(*(cast.pool.generate(PROMPT, group_id, 8) for group_id in order))
        assert len(answers) == 3
        await cast.pool.generate(PROMPT, 7, 2)
        return [sorted(g.parts) for g in cast.first], [g.waves for g in cast.first]

    parts, waves = asyncio.run(run([4, 5, 6]))
    assert (parts, waves) == asyncio.run(run([6, 5, 4]))
    assert parts[0][:3] == [(4, 0, 4), (5, 0, 4), (6, 0, 4)] and parts[1] == [(4, 4, 4), (5, 4, 4), (6, 4, 4)]
    first, second = waves
    assert {wave.size for wave in (*first[:3], *second)} == {3}
    assert len({wave.number for wave in first[:3]}) == 1 and first[0].number != second[0].number
    assert first[3] is None, "group 7 belongs to no wave"


def test_a_seat_whose_generator_is_lost_is_taken_by_another_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, replace=False)
        cast.pool.together([0, 1], 4)
        cast.first[0].fault = ActorDiedError()
        answers = await asyncio.gather(*(cast.pool.generate(PROMPT, group_id, 4) for group_id in (0, 1)))
        assert {payload for _, payload in answers} == {"0..4 of g1"}
        assert sorted(wave is None for wave in cast.first[1].waves) == [False, True]

    asyncio.run(run())


def test_a_generator_that_does_not_start_in_time_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    config = Config(run=RunConfig(name="r", root=str(tmp_path)))
    config.rollout.start_timeout_s = 0.01
    log = config.folder / "logs" / "rollout_1.log"
    log.parent.mkdir(parents=True)
    log.write_text("reading weights\n")

    async def run() -> None:
        late = FakeGenerator("g1")
        late.gates["start"].clear()
        with pytest.raises(ActorError, match=r"rollout 1 did not start: .*\(rollout.start_timeout_s\)") as failed:
            await started(config, "rollout", 1, late, late.start.remote())
        assert str(failed.value).endswith(f"end of {log}:\n  reading weights")

    asyncio.run(run())
