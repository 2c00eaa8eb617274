"""Successors of lost generators: what they hold before they serve, the races with a publication, and the end of it."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fake_generators import CHECKSUM, PROMPT, Cast, FakeGenerator
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError

from actors.deadline import DeadlineError
from actors.member import Member, MemberLostError
from actors.process import Whereabouts
from actors.spares import Spares
from actors.watch import Watch
from medtvt_rl.faults import RoleLostError
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.weights import WeightBufferError


def publish(cast: Cast, version: int) -> Any:
    pool: Any = cast.pool
    return pool.update_weights(f"weights {version}", version, CHECKSUM)


def closed(*kinds: str) -> Any:
    """Prepares a successor so that its calls of these kinds wait."""

    def prepare(successor: FakeGenerator) -> None:
        for kind in kinds:
            successor.gates[kind].clear()

    return prepare


@pytest.mark.parametrize(
    "fault",
    [
        ActorDiedError(),
        EngineBrokenError("a step failed"),
        ActorUnavailableError("", None),
        OutOfMemoryError("killed by the memory monitor"),
    ],
)
def test_a_lost_generator_is_replaced_alone_while_the_others_go_on(tmp_path: Path, fault: Exception) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.prepare = closed("start")
        cast.first[0].fault = fault
        answers = await asyncio.gather(*(cast.pool.generate(PROMPT, group_id, 4) for group_id in range(6)))
        assert {payload for _, payload in answers} == {"0..4 of g1"} and cast.pool.num_left == 1
        assert cast.first[0].dead.is_set(), "what is left of it must not hold its bundle"
        cast.successors[0][0].gates["start"].set()
        await cast.settle()
        assert cast.pool.num_left == 2
        await asyncio.gather(*(cast.pool.generate(PROMPT, group_id, 4) for group_id in (6, 7)))
        assert cast.successors[0][0].groups == [6] and not cast.successors[1]
        assert "it is started again; 1 left" in cast.told[0] and cast.told[1].startswith("rollout 0 serves again")

    asyncio.run(run())


def test_a_group_waits_for_the_successor_of_the_only_generator(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)
        cast.first[0].gates["generate"].clear()
        cast.prepare = closed("start")
        groups = [asyncio.create_task(cast.pool.generate(PROMPT, 3, 4)), asyncio.create_task(cast.pool.stats())]
        await cast.settle()
        cast.first[0].dead.set()
        await cast.settle()
        later = asyncio.create_task(cast.pool.generate(PROMPT, 4, 4))
        await cast.settle()
        assert not groups[0].done() and not later.done() and cast.pool.num_left == 0
        cast.successors[0][0].gates["start"].set()
        assert (await groups[0])[1] == "0..4 of g0.1" and (await later)[1] == "0..4 of g0.1"
        assert sorted(cast.successors[0][0].groups) == [3, 4]

    asyncio.run(run())


def test_the_wait_for_a_successor_has_a_deadline(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, vacancy_timeout_s=0.05)
        cast.prepare = closed("start")
        cast.first[0].dead.set()
        with pytest.raises(RoleLostError, match=r"vacancy_timeout_s\) for a rollout actor to generate group 3; "):
            await cast.pool.generate(PROMPT, 3, 4)

    asyncio.run(run())


def test_a_successor_loads_the_newest_weights_before_it_serves(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.prepare = closed("update")
        await publish(cast, 1)
        await publish(cast, 2)
        cast.first[0].dead.set()
        await cast.pool.generate(PROMPT, 0, 4)
        await cast.settle()
        (successor,) = cast.successors[0]
        assert successor.versions == [2] and cast.pool.num_left == 1
        successor.gates["update"].set()
        await cast.settle()
        assert cast.pool.num_left == 2 and "from version 2 on" in cast.told[-1]

    asyncio.run(run())


@pytest.mark.parametrize(("waits_in", "loaded"), [("start", [3]), ("update", [2, 3])])
def test_a_publication_while_the_successor_comes_up_reaches_it_before_it_serves(
    tmp_path: Path, waits_in: str, loaded: list[int]
) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.prepare = closed(waits_in)
        await publish(cast, 2)
        cast.first[0].dead.set()
        await cast.pool.generate(PROMPT, 0, 4)
        await cast.settle()
        await publish(cast, 3)
        assert cast.pool.num_left == 1, "the publication waits for nobody who does not serve"
        (successor,) = cast.successors[0]
        successor.gates[waits_in].set()
        await cast.settle()
        assert successor.versions == loaded and cast.pool.num_left == 2
        await publish(cast, 4)
        assert successor.versions == [*loaded, 4]

    asyncio.run(run())


def test_a_successor_that_comes_up_in_the_middle_of_a_publication_holds_it(tmp_path: Path) -> None:
    """Generator 1 keeps the publication under way while the successor of generator 0 starts, loads and serves."""

    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.prepare = closed("start")
        await publish(cast, 1)
        cast.first[0].dead.set()
        await cast.pool.generate(PROMPT, 0, 4)
        cast.first[1].gates["update"].clear()
        publication = asyncio.create_task(publish(cast, 2))
        await cast.settle()
        (successor,) = cast.successors[0]
        successor.gates["start"].set()
        await cast.settle()
        assert not publication.done() and cast.pool.num_left == 2 and successor.versions == [2]
        cast.first[1].gates["update"].set()
        await publication
        assert successor.versions == [2], "loaded once"

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["died", "broke", "damaged", "refused", "wrong", "late"])
def test_a_generator_that_did_not_take_the_weights_is_killed_and_replaced(tmp_path: Path, fault: str) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, update_timeout_s=0.05)
        lost = cast.first[1]
        errors: dict[str, Exception] = {
            "broke": EngineBrokenError("half-way"),
            "damaged": WeightBufferError("checksum"),
            "refused": RayTaskError("f", "traceback", KeyError("no such layer")),
        }
        lost.fault = errors.get(fault)
        lost.checksum += fault == "wrong"
        if fault == "late":
            lost.gates["update"].clear()
        if fault == "died":
            lost.dead.set()
        await publish(cast, 1)
        await cast.settle()
        assert lost.dead.is_set() and cast.pool.num_left == 2
        assert cast.successors[1][0].versions == [1] and not cast.successors[0]
        if fault == "wrong":
            assert "rollout 1 holds checksum 12 of version 1, sent 11" in cast.told[0]

    asyncio.run(run())


class Learner:
    """Exports on demand, when `gate` is open; it has come to `version`."""

    def __init__(self, cast: Cast, version: int) -> None:
        self.version, self.asked = version, 0
        self.gate = asyncio.Event()
        self.gate.set()
        cast.pool.ask_learner(self.export)

    async def export(self) -> tuple[str, int, int]:
        self.asked += 1
        await self.gate.wait()
        return f"weights {self.version} again", self.version, CHECKSUM


@pytest.mark.parametrize("has_learner", [True, False])
def test_weights_that_go_down_in_a_publication_are_exported_once_more_and_no_engine_is_lost(
    tmp_path: Path, has_learner: bool
) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3, replace=False)
        for generator in cast.first[:2]:
            generator.missing = ("weights 1",)
        if has_learner:
            learner = Learner(cast, 1)
            await publish(cast, 1)
            assert learner.asked == 1 and cast.pool.num_left == 3
            assert [generator.versions for generator in cast.first] == [[1, 1], [1, 1], [1]]
            (line,) = cast.told
            assert line.startswith("the weights of version 1 went down with a node; the learner exports")
        else:
            await publish(cast, 1)
            assert cast.pool.num_left == 1

    asyncio.run(run())


def test_successors_whose_weights_went_down_with_a_node_have_them_exported_once_and_cost_no_further_restart(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, max_restarts=1)
        learner = Learner(cast, 2)
        await publish(cast, 1)
        cast.prepare = lambda successor: setattr(successor, "missing", ("weights 1",))
        for generator in cast.first:
            generator.dead.set()
        await cast.pool.stats()
        await cast.settle()
        assert cast.pool.num_left == 2 and learner.asked == 1
        assert [cast.successors[index][0].versions for index in range(2)] == [[1, 2], [1, 2]]
        assert "serves again, from version 2 on" in cast.told[-1]

    asyncio.run(run())


def test_a_publication_comes_before_an_export_that_was_asked_for_earlier(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)
        learner = Learner(cast, 1)
        await publish(cast, 1)
        cast.prepare = lambda successor: setattr(successor, "missing", ("weights 1",))
        learner.gate.clear()
        cast.first[0].dead.set()
        group = asyncio.create_task(cast.pool.generate(PROMPT, 0, 4))
        await cast.settle()
        await publish(cast, 2)
        learner.gate.set()
        await group
        assert cast.successors[0][0].versions == [1, 2]

    asyncio.run(run())


def test_without_a_learner_nobody_succeeds(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)

        async def export() -> Any:
            raise RoleLostError("the learner is lost: rank 0, train_step: died", ())

        cast.pool.ask_learner(export)
        await publish(cast, 1)
        cast.prepare = lambda successor: setattr(successor, "missing", ("weights 1",))
        cast.first[0].dead.set()
        with pytest.raises(RoleLostError, match=r"no rollout actor is left; rollout 0 is lost: .* the learner is lost"):
            await cast.pool.generate(PROMPT, 0, 4)
        assert len(cast.successors[0]) == 1 and not await cast.pool.add(1)

    asyncio.run(run())


def test_a_late_update_is_lost_even_where_the_generator_answers_others(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, update_timeout_s=0.05)
        cast.first[0].gates["update"].clear()
        publication = asyncio.create_task(publish(cast, 1))
        await asyncio.sleep(0.01)
        await cast.pool.generate(PROMPT, 0, 4)
        await publication
        await cast.settle()
        assert cast.first[0].dead.is_set() and cast.successors[0][0].versions == [1]

    asyncio.run(run())


def test_wrong_weights_time_and_again_end_the_run(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)

        def corrupt(successor: FakeGenerator) -> None:
            successor.checksum = 12

        cast.prepare = corrupt
        cast.first[0].checksum = 12
        await publish(cast, 1)
        await cast.settle()
        assert len(cast.successors[0]) == 5 and all(one.dead.is_set() for one in cast.successors[0])
        with pytest.raises(RoleLostError, match="no rollout actor is left; rollout 0 is lost: WeightSyncErr"):
            await cast.pool.generate(PROMPT, 0, 4)

    asyncio.run(run())


def test_a_silent_generator_is_killed_and_its_group_goes_to_the_successor(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, generate_timeout_s=0.05)
        cast.first[0].gates["generate"].clear()
        _, payload = await cast.pool.generate(PROMPT, 5, 4)
        assert payload == "0..4 of g0.1" and cast.first[0].dead.is_set()
        assert "rollout 0 is lost: DeadlineError: waited 0.05 s (rollout.generate_timeout_s)" in cast.told[0]

    asyncio.run(run())


def test_a_group_that_breaks_two_generators_is_given_up_alone(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3, max_attempts=2)
        for generator in cast.first[:2]:
            generator.fault = EngineBrokenError("this prompt")
        with pytest.raises(MemberLostError, match="rollout 1 is lost: EngineBrokenError: this prompt"):
            await cast.pool.generate(PROMPT, 0, 4)
        await cast.settle()
        assert cast.pool.num_left == 3

    asyncio.run(run())


@pytest.mark.parametrize("works", [False, True])
def test_an_engine_that_stands_still_after_an_answer_is_lost_and_its_group_made_elsewhere(
    tmp_path: Path, works: bool
) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, generate_timeout_s=0.5, silence_s=0.1)
        pool: Any = cast.pool
        first, steps = cast.first[0], count()
        if works:
            first.stats.remote = lambda: asyncio.sleep(0, {"busy_s": float(next(steps))})
        pool._roster.keep_watch()
        first.gates["generate"].clear()
        group = asyncio.create_task(cast.pool.generate(PROMPT, 3, 4))
        await asyncio.sleep(0.05)
        await cast.pool.stats()
        if works:
            with pytest.raises(DeadlineError):
                await group
            assert not first.dead.is_set()
        else:
            assert (await group)[1] == "0..4 of g0.1" and cast.successors[0][0].groups == [3]
            assert "for rollout 0 to generate group 3; its engine stands still; it is started again" in cast.told[0]
        cast.pool.stop()

    asyncio.run(run())


def test_a_broken_engine_is_replaced_though_nothing_was_asked_of_it(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, silence_s=0.05)
        pool: Any = cast.pool
        cast.first[1].broken = "a step failed"
        pool._roster.keep_watch()
        await asyncio.sleep(0.2)
        assert cast.first[1].dead.is_set() and cast.pool.num_left == 2 and not cast.first[0].dead.is_set()
        assert cast.told[0].startswith("rollout 1 is lost: EngineBrokenError: a step failed")
        cast.pool.stop()

    asyncio.run(run())


def test_long_idleness_is_no_standstill() -> None:
    watch = Watch("rollout", 60.0, list, lambda member, error: None)
    member = Member(index=0, handle=None, moved_at=100.0, seen_at=1000.0)
    assert watch.is_still(member, since=900.0) and not watch.is_still(member, since=950.0)
    assert not watch.is_still(member, since=1200.0), "nobody has looked since it was asked"


@pytest.mark.parametrize(("num_gone", "is_made"), [(4, True), (5, True), (6, False)])
def test_nodes_that_go_under_a_group_do_not_count_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gone: int, is_made: bool
) -> None:
    monkeypatch.setattr("actors.roster.NODES_PER_GROUP", 4)

    class Nodes:
        """Every bundle has its node; those of the first generators were taken away."""

        def has_node(self, role: str, index: int) -> bool:
            return True

        def is_gone(self, node_id: str) -> bool:
            return int(node_id) < num_gone

    async def run() -> None:
        cast = Cast(tmp_path, 1, max_attempts=2, max_restarts=100)
        pool: Any = cast.pool
        pool._roster._places.bundles = Nodes()

        def prepare(generator: FakeGenerator) -> None:
            generation = len(cast.successors[0]) + 1
            generator.where = Whereabouts(node="", pid=1, devices=None, node_id=f"{generation}")
            if generation < num_gone:
                generator.fault = ActorDiedError()
                generator.start.remote = lambda: asyncio.sleep(0, generator.where)

        cast.prepare = prepare
        pool._roster.serving[0].where = Whereabouts(node="", pid=1, devices=None, node_id="0")
        cast.first[0].fault = ActorDiedError()
        if is_made:
            assert (await cast.pool.generate(PROMPT, 3, 4))[1] == f"0..4 of g0.{num_gone}"
        else:
            with pytest.raises(MemberLostError):
                await cast.pool.generate(PROMPT, 3, 4)

    asyncio.run(run())


@pytest.mark.parametrize("moves", [True, False])
def test_those_that_were_taken_out_before_they_were_done_do_not_count(tmp_path: Path, moves: bool) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 4, max_attempts=1)
        for generator in cast.first[:3]:
            generator.gates["generate"].clear()
        group = asyncio.create_task(cast.pool.generate(PROMPT, 3, 4))
        for index in range(3):
            await cast.settle()
            assert cast.first[index].groups == [3]
            if moves:
                cast.prepare = closed("start")
                cast.pool.move(index, "it will be taken away", 0.0, lambda: None)
            else:
                await cast.pool._roster.retire(index, 0.0)
        assert (await group)[1] == "0..4 of g3"

    asyncio.run(run())


def test_failures_of_one_that_is_gone_do_not_touch_its_successor(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)
        cast.first[0].gates["generate"].clear()
        groups = [asyncio.create_task(cast.pool.generate(PROMPT, group_id, 4)) for group_id in range(5)]
        await cast.settle()
        cast.first[0].dead.set()
        assert {payload for _, payload in await asyncio.gather(*groups)} == {"0..4 of g0.1"}
        assert len(cast.successors[0]) == 1 and not cast.successors[0][0].dead.is_set() and len(cast.told) == 2

    asyncio.run(run())


def test_one_that_keeps_dying_is_given_up_and_the_others_go_on(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, max_restarts=2)
        cast.prepare = lambda successor: successor.dead.set()
        cast.first[0].dead.set()
        await cast.pool.generate(PROMPT, 0, 4)
        await cast.settle()
        assert (
            len(cast.successors[0]) == 2 and "given up (supervision.max_restarts: 2 in 600 s); 1 left" in cast.told[-1]
        )
        assert (await cast.pool.generate(PROMPT, 1, 4))[1] == "0..4 of g1"
        cast.first[1].dead.set()
        with pytest.raises(RoleLostError) as ended:
            await cast.pool.generate(PROMPT, 2, 4)
        assert "rollout 0 is lost" in str(ended.value) and "rollout 1 is lost" in str(ended.value)

    asyncio.run(run())


@pytest.mark.parametrize("went_with_its_node", [True, False])
def test_a_spare_is_tried_first_and_costs_no_restart_where_it_went_with_its_node(
    tmp_path: Path, went_with_its_node: bool
) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, max_restarts=1)
        spare = FakeGenerator("spare")
        spares = Spares("rollout", 1, lambda index: spare, 5.0, "s", kill=lambda handle: handle.dead.set())
        spares._waiting[0] = spare
        cast.pool._roster._spares = spares
        if went_with_its_node:
            spare.dead.set()
        cast.first[0].dead.set()
        made_by = "g0.1" if went_with_its_node else "spare"
        assert (await cast.pool.generate(PROMPT, 0, 4))[1] == f"0..4 of {made_by}"
        assert len(cast.successors[0]) == went_with_its_node and not spares.ready

    asyncio.run(run())


def test_restarts_of_long_ago_do_not_count(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, max_restarts=1, restart_window_s=0.05)
        for life in range(3):
            (cast.successors[0] or cast.first)[-1].dead.set()
            assert (await cast.pool.generate(PROMPT, life, 4))[1] == f"0..4 of g0.{life + 1}"
            await asyncio.sleep(0.06)

    asyncio.run(run())


def test_scoring_waits_for_the_successor_where_none_is_left(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)
        pool: Any = cast.pool
        cast.first[0].dead.set()
        assert len(await pool.score("group", 0)) == 1
        assert len(cast.successors[0]) == 1

    asyncio.run(run())


def test_stop_ends_those_on_their_way_too(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.prepare = closed("start")
        cast.first[0].dead.set()
        await cast.pool.generate(PROMPT, 0, 4)
        await cast.settle()
        cast.pool.stop()
        await cast.settle()
        assert cast.first[1].dead.is_set() and cast.successors[0][0].dead.is_set()
        assert len(cast.successors[0]) == 1

    asyncio.run(run())


def test_a_generator_whose_log_probs_are_not_finite_is_replaced_and_its_group_made_by_another(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.first[0].finite = False
        assert (await cast.pool.generate(PROMPT, 0, 4))[1] == "0..4 of g1"
        await cast.settle()
        assert cast.first[0].dead.is_set() and cast.pool.num_left == 2
        assert cast.told[0].startswith("rollout 0 is lost: SickError: not finite when it was asked to generate group 0")

    asyncio.run(run())


def test_an_incident_says_who_was_lost_why_how_long_and_with_how_many_groups(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        cast.first[0].gates["generate"].clear()
        groups = [asyncio.create_task(cast.pool.generate(PROMPT, group_id, 4)) for group_id in range(4)]
        await cast.settle()
        cast.first[0].dead.set()
        await asyncio.gather(*groups)
        await cast.settle()
        (incident,) = cast.incidents.over
        assert (incident.role, incident.index, incident.outcome) == ("rollout", 0, "replaced")
        assert incident.groups == len(cast.first[0].groups) and incident.cause.startswith("ActorDiedError")
        assert cast.incidents.metrics() == {
            "restarts/rollout": 1,
            "restarts/reward": 0,
            "restarts/reference": 0,
            "restarts/learner": 0,
        }

    asyncio.run(run())
