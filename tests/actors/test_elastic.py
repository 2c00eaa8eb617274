"""Generators that come and go: limits, who goes, what a node that does not come costs; and the pool's side of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_generators import CHECKSUM, PROMPT, Cast, FakeGenerator
from waiting import until

from actors import elastic
from actors.bundles import Bundle
from actors.elastic import Elastic, Signals
from actors.spares import Spares
from medtvt_rl.config import Config
from medtvt_rl.faults import RoleLostError
from medtvt_rl.rollout.config import ElasticConfig
from medtvt_rl.rollout.pending import EngineBrokenError


class Nodes:
    """Seats on so many nodes that have room for one generator each; those beyond it wait for a node."""

    def __init__(self, taken: int, room: int) -> None:
        self.taken, self.room = list(range(taken)), room
        self.by_room: list[int] = []

    def add(self, bundle: Bundle, room_first: bool = False) -> None:
        self.taken.append(bundle.index)
        if room_first:
            self.by_room.append(bundle.index)

    def remove(self, role: str, index: int) -> None:
        self.taken.remove(index)

    def has_node(self, role: str, index: int) -> bool:
        return self.taken.index(index) < self.room

    def has_room(self, bundle: Bundle) -> bool:
        return len(self.taken) < self.room

    def indices(self, role: str) -> list[int]:
        return list(self.taken)


class Pool:
    """Generators that serve at once, unless they are `broken`."""

    def __init__(self, serving: int) -> None:
        self.serving = list(range(serving))
        self.on_their_way = set[int]()
        self.broken = False

    async def add(self, index: int) -> bool:
        if not self.broken:
            self.serving.append(index)
        return not self.broken

    async def remove(self, index: int) -> None:
        self.serving.remove(index)

    def slowest(self) -> int:
        return 1 if 1 in self.serving else max(self.serving)


STEP = {"seconds/step": 4.0, "seconds/wait_groups": 1.0, "seconds/conclude": 0.5, "seconds/rollout_idle": 0.25}
WISHES: list[int] = []
SEEN: list[Signals] = []


class Wishes:
    """A policy that says what the test wrote down."""

    def __init__(self, config: Config) -> None: ...

    def decide(self, now: float, signals: Signals) -> int:
        SEEN.append(signals)
        return WISHES.pop(0) if WISHES else 0


class Raises(Wishes):
    """A policy with a fault."""

    def decide(self, now: float, signals: Signals) -> int:
        raise KeyError("seconds")


def configured(**rollout: Any) -> Config:
    config = Config()
    config.rollout.scaling_interval_s = 0.002
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return config


def played(
    config: Config, pool: Pool, nodes: Nodes, play: Callable[[Elastic, list[str]], Any], poll_s: float = 0.002
) -> list[str]:
    """Runs `play` beside an Elastic; what that reported."""
    told: list[str] = []

    async def run() -> None:
        keeper = Elastic(config, pool, nodes, told.append)
        task = asyncio.create_task(keeper.run())
        await play(keeper, told)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic, "NODE_POLL_S", poll_s)
        asyncio.run(run())
    return told


def test_a_generator_is_added_wherever_a_node_has_room_up_to_the_limit() -> None:
    pool, nodes = Pool(1), Nodes(taken=1, room=1)

    async def play(keeper: Elastic, told: list[str]) -> None:
        await asyncio.sleep(0.05)
        assert pool.serving == [0], "no node has room"
        nodes.room = 9
        await until(lambda: pool.serving == [0, 1, 2], pool.serving)
        await asyncio.sleep(0.05)
        assert pool.serving == [0, 1, 2] == nodes.taken

    played(configured(max=3), pool, nodes, play)


def test_those_asked_for_at_the_start_come_when_they_have_nodes() -> None:
    pool, nodes = Pool(1), Nodes(taken=1, room=1)
    config = configured(min=1, num_generators=3, max=3, scaling=f"{__name__}:Wishes")

    async def play(keeper: Elastic, told: list[str]) -> None:
        await until(lambda: nodes.taken == [0, 1, 2], "the bundles are what an autoscaler sees")
        nodes.room = 3
        await until(lambda: sorted(pool.serving) == [0, 1, 2])

    played(config, pool, nodes, play)


def test_where_room_alone_decides_those_asked_for_are_asked_for_until_they_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elastic, "RETRY_S", 0.01)
    pool, nodes = Pool(1), Nodes(taken=1, room=1)
    config = configured(min=1, num_generators=2, max=3)
    config.placement.timeout_s = 0.02

    async def play(keeper: Elastic, told: list[str]) -> None:
        await until(lambda: len(told) > 1, "no node comes in time, twice")
        nodes.room = 2
        await until(lambda: pool.serving == [0, 1], "it is still asked for")
        nodes.room = 3
        await until(lambda: pool.serving == [0, 1, 2])
        assert set(nodes.by_room) == {2}, "those asked for go where the declared order says, the others where room is"

    played(config, pool, nodes, play)


def test_room_is_not_taken_twice_while_those_asked_for_wait_for_theirs() -> None:
    """Ray gives a bundle its node a moment after it was asked for; until then the node looks free."""

    class Slow(Nodes):
        settled = False

        def has_node(self, role: str, index: int) -> bool:
            return self.settled and super().has_node(role, index)

        def has_room(self, bundle: Bundle) -> bool:
            return len(self.taken) < self.room if self.settled else self.room > 1

    pool, nodes = Pool(1), Slow(taken=1, room=3)

    async def play(keeper: Elastic, told: list[str]) -> None:
        await until(lambda: nodes.taken == [0, 1, 2], nodes.taken)
        await asyncio.sleep(0.05)
        assert nodes.taken == [0, 1, 2], "the room is that of the two that come"
        nodes.settled = True
        await until(lambda: sorted(pool.serving) == [0, 1, 2], pool.serving)
        nodes.room = 4
        await until(lambda: sorted(pool.serving) == [0, 1, 2, 3], "room that is there is taken")

    played(configured(min=1, num_generators=3, max=5), pool, nodes, play)
    assert nodes.by_room == [3]


def test_one_that_is_given_up_gives_its_node_back_and_another_comes_with_what_is_left_of_its_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "RETRY_S", 0.5)
    config = configured(min=2, num_generators=2, max=2, scaling="need")
    config.rollout.elastic = ElasticConfig(window_s=60.0, cooldown_s=0.0)
    nodes = Nodes(taken=2, room=2)

    async def run() -> None:
        cast = Cast(tmp_path, 2, max_restarts=1)
        cast.prepare = lambda successor: successor.gates["start"].clear()

        async def lost(generator: Any) -> None:
            generator.dead.set()
            await asyncio.gather(*(cast.pool.generate(PROMPT, group_id, 4) for group_id in (0, 1)))
            await cast.settle()

        keeper = Elastic(config, cast.pool, nodes, cast.told.append)
        task = asyncio.create_task(keeper.run())
        await lost(cast.first[0])
        await asyncio.sleep(0.02)
        assert nodes.taken == [0, 1], "its successor needs it"
        await lost(cast.successors[0][0])
        await until(lambda: nodes.taken == [1], cast.told)
        keeper.observe(STEP)
        await asyncio.sleep(0.02)
        assert nodes.taken == [1], "it takes its time"
        cast.prepare = lambda successor: None
        while cast.pool.serving != [0, 1]:
            keeper.observe(STEP)
            await asyncio.sleep(0.01)
        assert nodes.taken == [1, 0] and len(cast.successors[0]) == 2
        await lost(cast.successors[0][1])
        assert "given up (supervision.max_restarts: 1 in 600 s); 1 left" in cast.told[-1]
        await until(lambda: nodes.taken == [1], cast.told)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_the_bundle_of_one_that_leaves_or_is_on_its_way_is_nobody_else_s() -> None:
    pool, nodes, gone = Pool(4), Nodes(taken=5, room=5), asyncio.Event()
    pool.serving.remove(3)  # it moves to another node
    pool.on_their_way = {3, 4}

    async def leave_slowly(index: int) -> None:
        pool.serving.remove(index)
        await gone.wait()

    async def play(keeper: Elastic, told: list[str]) -> None:
        WISHES.append(-1)
        keeper.observe(STEP)
        await until(lambda: pool.serving == [0, 2], pool.serving)
        await asyncio.sleep(0.05)
        assert nodes.taken == [0, 1, 2, 3, 4], "generator 1 ends what it has"
        gone.set()
        await until(lambda: nodes.taken == [0, 2, 3, 4], nodes.taken)

    pool.remove = leave_slowly  # type: ignore[method-assign]
    played(configured(min=1, max=5, num_generators=3, scaling=f"{__name__}:Wishes"), pool, nodes, play)


def test_a_policy_that_raises_is_told_once_and_not_asked_again() -> None:
    pool, nodes = Pool(1), Nodes(taken=1, room=9)
    config = configured(max=3, scaling=f"{__name__}:Raises")

    async def play(keeper: Elastic, told: list[str]) -> None:
        for _ in range(3):
            keeper.observe(STEP)
        await asyncio.sleep(0.05)
        assert pool.serving == [0], "not as if room alone decided"

    (line,) = played(config, pool, nodes, play)
    assert line == f"no more generators come or go: rollout.scaling {__name__}:Raises raised KeyError: 'seconds'"


def test_a_policy_is_obeyed_within_the_limits_and_the_slowest_goes() -> None:
    pool, nodes = Pool(3), Nodes(taken=3, room=9)
    config = configured(min=2, num_generators=3, max=4, scaling=f"{__name__}:Wishes")
    SEEN.clear()

    async def play(keeper: Elastic, told: list[str]) -> None:
        async def step(wish: int) -> None:
            WISHES[:] = [wish]
            keeper.observe(STEP)
            await asyncio.sleep(0.05)

        await step(1)
        await until(lambda: pool.serving == [0, 1, 2, 3])
        await step(1)
        assert pool.serving == [0, 1, 2, 3], "not beyond rollout.max"
        await step(-1)
        await until(lambda: pool.serving == [0, 2, 3] and nodes.taken == [0, 2, 3], "the slowest goes")
        await step(0)
        assert pool.serving == [0, 2, 3]
        await step(1)
        await until(lambda: pool.serving == [0, 2, 3, 1], "its number is free again")
        for _ in range(5):
            await step(-1)
        assert len(pool.serving) == 2 == len(nodes.taken), "not below rollout.min"

    played(config, pool, nodes, play)
    assert SEEN[0] == Signals(seconds=4.0, learner_waited_s=1.5, generator_idle_s=0.25, generators=3, starting=0)


def test_a_decision_is_carried_out_however_short_the_steps_are() -> None:
    pool, nodes = Pool(1), Nodes(taken=1, room=9)
    config = configured(max=2, scaling=f"{__name__}:Wishes", scaling_interval_s=0.2)

    async def play(keeper: Elastic, told: list[str]) -> None:
        await asyncio.sleep(0.05)
        WISHES[:] = [1]
        for _ in range(5):
            keeper.observe(STEP)
        await until(lambda: pool.serving == [0, 1], told)

    played(config, pool, nodes, play)


def test_by_need_one_comes_while_the_learner_waits_and_goes_while_generators_are_idle() -> None:
    pool, nodes = Pool(2), Nodes(taken=2, room=9)
    config = configured(min=1, num_generators=2, max=3, scaling="need")
    config.rollout.elastic = ElasticConfig(window_s=1.0, min_steps=1, cooldown_s=0.0)
    idle = {"seconds/step": 4.0, "seconds/wait_groups": 0.0, "seconds/rollout_idle": 3.0}

    async def play(keeper: Elastic, told: list[str]) -> None:
        for step, expected in ((STEP, [0, 1, 2]), (idle, [0, 2]), (idle, [0])):
            while sorted(pool.serving) != expected:
                keeper.observe(step)
                await asyncio.sleep(0.02)
        keeper.observe(idle)
        await asyncio.sleep(0.05)
        assert pool.serving == [0], "not below rollout.min"

    played(config, pool, nodes, play)


def test_a_node_that_does_not_come_and_a_generator_that_does_not_serve_cost_nothing_but_a_line() -> None:
    pool, nodes = Pool(1), Nodes(taken=1, room=1)
    config = configured(max=2, scaling=f"{__name__}:Wishes")
    config.placement.timeout_s = 0.05

    async def play(keeper: Elastic, told: list[str]) -> None:
        WISHES[:] = [1]
        keeper.observe(STEP)
        await until(lambda: bool(told))
        assert "no node took one more generator within 0.05 s (placement.timeout_s): rollout 1: 1 CPU" in told[0]
        await until(lambda: nodes.taken == [0], "its bundle is given back")
        nodes.room, WISHES[:] = 9, [1, 1, 1]
        keeper.observe(STEP)
        await asyncio.sleep(0.05)
        assert pool.serving == [0], "it is not tried again at once"
        keeper._not_before, pool.broken = 0.0, True
        keeper.observe(STEP)
        await until(lambda: keeper._not_before > 0 and nodes.taken == [0])
        keeper._not_before, pool.broken = 0.0, False
        keeper.observe(STEP)
        await until(lambda: pool.serving == [0, 1])

    played(config, pool, nodes, play)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.scaling: .* makes no policy"):
        Elastic(configured(scaling="builtins:str"), Pool(1), Nodes(1, 1), print)
    with pytest.raises(ValueError, match=r"rollout\.scaling: no module"):
        Elastic(configured(scaling="no.such:Policy"), Pool(1), Nodes(1, 1), print)


def test_one_that_joins_holds_the_newest_weights_and_one_that_leaves_ends_what_it_had(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.successors[2] = []
        await cast.pool.update_weights("weights", 3, CHECKSUM)  # type: ignore[arg-type]
        assert await cast.pool.add(2) and cast.pool.serving == [0, 1, 2]
        (new,) = cast.successors[2]
        assert new.versions == [3] and "rollout 2 joins, from version 3 on; 3 serve" in cast.told
        new.gates["generate"].clear()
        groups = [asyncio.create_task(cast.pool.generate(PROMPT, group_id, 4)) for group_id in range(3)]
        await cast.settle()
        leaving = asyncio.create_task(cast.pool.remove(2))
        await cast.settle()
        assert cast.pool.serving == [0, 1] and not new.dead.is_set(), "it has a group left to make"
        new.gates["generate"].set()
        payloads = {payload for _, payload in await asyncio.gather(*groups)}
        await leaving
        assert payloads == {"0..4 of g0", "0..4 of g1", "0..4 of g2.1"} and new.dead.is_set()
        await cast.pool.generate(PROMPT, 9, 4)
        assert 9 not in new.groups

    asyncio.run(run())


def test_one_that_does_not_start_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)
        cast.successors[1] = []
        cast.prepare = lambda generator: generator.faults.update(start=EngineBrokenError("no GPU"))
        assert not await cast.pool.add(1) and cast.pool.serving == [0]
        assert "rollout 1 does not join: EngineBrokenError: no GPU" in cast.told[-1]
        assert cast.successors[1][0].dead.is_set()

    asyncio.run(run())


def test_one_that_takes_the_place_of_one_before_does_not_take_its_spare(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        spare = FakeGenerator("spare of g1")
        spares = Spares("rollout", 1, lambda index: spare, 5.0, "s", kill=lambda handle: handle.dead.set())
        spares._waiting[1] = spare
        cast.pool._spares = spares
        await cast.pool._roster.retire(1, 1.0)
        assert await cast.pool.add(1)
        assert spare.dead.is_set() and spares.take(1) is None, "it sat in the bundle that is given back"

    asyncio.run(run())


def test_who_waits_for_one_that_does_not_start_learns_that_none_is_left(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, max_restarts=0)
        cast.successors[1] = []
        cast.prepare = lambda generator: generator.gates["start"].clear()
        joins = asyncio.create_task(cast.pool.add(1))
        await cast.settle()
        cast.first[0].dead.set()
        group = asyncio.create_task(cast.pool.generate(PROMPT, 0, 4))
        await cast.settle()
        assert not group.done()
        cast.successors[1][0].dead.set()
        with pytest.raises(RoleLostError, match="no rollout actor is left"):
            await asyncio.wait_for(group, timeout=5)
        assert not await joins

    asyncio.run(run())
