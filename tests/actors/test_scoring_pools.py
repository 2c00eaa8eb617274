"""Scorers and references that hang, die or are sick are replaced; the group that was with them is asked of another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, RpcError
from waiting import until

from actors.failure import ActorError
from actors.member import Member, MemberLostError, SickError
from actors.scoring_pools import ReferencePool, ReferenceRoster, ScorerPool, ScorerRoster
from actors.starting import started
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config, RunConfig, SupervisionConfig
from medtvt_rl.faults import RoleLostError
from medtvt_rl.types import ReferenceHeader


class Call:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class FakeActor:
    """Scores a group by its name: "hang" hangs, "die" dies, "die once" dies the first time that anyone scores it,
    "refuse" raises, "poison" is finite nowhere. One that is `sick` finds nothing finite."""

    died: ClassVar[set[str]] = set()

    def __init__(self, sick: bool = False) -> None:
        self.sick, self.dead, self.seen = sick, asyncio.Event(), list[str]()
        self.under_way = 0
        self.score = Call(self._score)
        self.ready = Call(self._ready)
        self.health = Call(self._ready)
        self.logprobs = Call(lambda group: (self._header(group), f"log-probs of {group}"))

    async def _ready(self) -> None:
        if self.dead.is_set():
            raise ActorDiedError

    async def _header(self, group: str) -> ReferenceHeader:
        await self._score(group)
        return ReferenceHeader(kl=None, seconds=0.0, finite=not self.sick and group != "poison")  # type: ignore[arg-type]

    async def _score(self, group: str) -> str:
        self.seen.append(group)
        self.under_way += 1
        assert self.under_way == 1, "one group at a time, so that it is known which one kills"
        await asyncio.sleep(0)
        if group == "die" or (group == "die once" and group not in self.died):
            self.died.add(group)
            self.dead.set()
        if group == "hang":
            await self.dead.wait()
        self.under_way -= 1
        if self.dead.is_set():
            raise ActorDiedError
        if group == "refuse":
            raise RayTaskError("score", "traceback", ValueError("no"))  # type: ignore[arg-type]
        return f"rewards of {group}"


class Cast:
    """Pools of fake actors of one role; `started` are all that ever were."""

    def __init__(self, tmp_path: Path, count: int = 1, **settings: Any) -> None:
        FakeActor.died = set()
        self.config = Config(run=RunConfig(name="r", root=str(tmp_path)), score_timeout_s=0.1)
        self.config.supervision = SupervisionConfig(**settings)
        (self.config.folder / "logs").mkdir(parents=True)
        self.started = [FakeActor() for _ in range(count)]
        self.told: list[str] = []
        self.incidents = Incidents(self.told.append)

    def roster(self, kind: type[Any]) -> Any:
        members = [Member(index=index, handle=handle) for index, handle in enumerate(self.started)]
        return kind(self.config, members, self.incidents, self._renew, lambda actor: actor.dead.set(), Timeline())

    def scorers(self) -> Any:
        return ScorerPool(self.config, self.roster(ScorerRoster))

    def references(self) -> Any:
        return ReferencePool(self.config, self.roster(ReferenceRoster))

    def _renew(self, index: int) -> FakeActor:
        self.started.append(FakeActor())
        return self.started[-1]


def test_the_group_of_a_scorer_that_dies_is_scored_by_its_successor_and_no_other_is_touched(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path)
        pool = cast.scorers()
        groups = ["a", "die once", "b", "c"]
        assert await asyncio.gather(*(pool.score(group) for group in groups)) == [f"rewards of {g}" for g in groups]
        first, second = cast.started
        assert sorted(first.seen + second.seen) == ["a", "b", "c", "die once", "die once"]
        assert cast.told[0].startswith("reward 0 is lost: ActorDiedError") and cast.told[1] == "reward 0 serves again"
        (incident,) = cast.incidents.over
        assert (incident.role, incident.outcome, incident.groups) == ("reward", "replaced", 1)
        assert cast.incidents.metrics()["restarts/reward"] == 1

    asyncio.run(run())


def test_thousands_that_wait_for_a_scorer_are_served_in_order_and_woken_once_each(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3)
        cast.config.score_timeout_s = 10.0
        pool, looked = cast.scorers(), 0
        wait_for_one = pool._roster.wait_for_one

        async def counted(purpose: str) -> None:
            nonlocal looked
            looked += 1
            await wait_for_one(purpose)

        pool._roster.wait_for_one = counted
        groups = [f"group {number}" for number in range(2000)]
        waiting = [asyncio.ensure_future(pool.score(group)) for group in groups]
        await asyncio.sleep(0)
        for cancelled in waiting[10:20]:
            cancelled.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert looked <= 2 * len(groups), "a scorer that is free wakes one, not all"
        for actor in cast.started:
            order = [int(group.split()[1]) for group in actor.seen]
            assert order == sorted(order)
        assert sum(len(actor.seen) for actor in cast.started) == len(groups) - 10

    asyncio.run(run())


@pytest.mark.parametrize("killer", ["die", "hang"])
def test_a_completion_that_kills_its_scorer_is_given_up_after_so_many_and_the_others_go_on(
    tmp_path: Path, killer: str
) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, max_attempts=3)
        pool = cast.scorers()
        behind = [asyncio.create_task(pool.score(group)) for group in ("a", killer, "b")]
        done = await asyncio.gather(*behind, return_exceptions=True)
        assert (done[0], done[2]) == ("rewards of a", "rewards of b")
        assert isinstance(done[1], MemberLostError)
        assert sum(actor.seen.count(killer) for actor in cast.started) == 3
        await asyncio.sleep(0.01)
        assert await pool.score("later") == "rewards of later" and len(cast.started) == 4

    asyncio.run(run())


def test_one_that_does_not_start_in_time_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path)
        cast.config.rollout.start_timeout_s = 0.01
        cast.started[0].ready = Call(asyncio.Event().wait)
        log = cast.config.folder / "logs" / "reward_0.log"
        log.write_text("reading the tokenizer\n")
        with pytest.raises(ActorError, match=r"reward 0 did not start: .*\(rollout.start_timeout_s\)") as failed:
            await started(cast.config, "reward", 0, cast.started[0], cast.started[0].ready.remote())
        assert str(failed.value).endswith(f"end of {log}:\n  reading the tokenizer")

    asyncio.run(run())


def test_a_scorer_that_keeps_dying_ends_the_role_with_its_incidents(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, max_restarts=1)
        log = cast.config.folder / "logs" / "reward_0.log"
        log.write_text("out of memory\n")
        pool = cast.scorers()
        with pytest.raises(RoleLostError, match="no reward actor is left; reward 0 is lost: ActorDiedError") as ended:
            await pool.score("die")
        *_, incident = ended.value.incidents
        assert incident.outcome == "given up" and incident.log_tail == ("out of memory",)
        assert "given up (supervision.max_restarts: 1 in 600 s)" in cast.told[-1]

    asyncio.run(run())


def test_a_refusal_costs_no_scorer(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path)
        with pytest.raises(ActorError, match="reward 0, asked to score a group: ValueError: no"):
            await cast.scorers().score("refuse")
        assert len(cast.started) == 1 and not cast.told

    asyncio.run(run())


def test_a_sick_reference_is_replaced_and_a_poisoned_group_costs_none(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        pool = cast.references()
        payload, header = await pool.logprobs("a")
        assert payload == "log-probs of a" and header.finite
        with pytest.raises(SickError, match="reference actors, asked to score a group, found values that are not"):
            await pool.logprobs("poison")
        await pool.logprobs("b")
        await pool.logprobs("b")
        assert not cast.told
        cast.started[0].sick = True
        assert (await pool.logprobs("c"))[1].finite
        assert cast.told[0].startswith("reference 0 is lost: SickError") and cast.started[0].dead.is_set()
        await asyncio.sleep(0.01)
        assert (await pool.logprobs("d"))[0] == "log-probs of d" and len(cast.started) == 3

    asyncio.run(run())


def test_the_only_reference_is_replaced_when_two_groups_in_a_row_are_not_finite(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path)
        pool = cast.references()
        cast.started[0].sick = True
        with pytest.raises(SickError):
            await pool.logprobs("a")
        assert (await pool.logprobs("b"))[1].finite and len(cast.started) == 2

    asyncio.run(run())


def test_one_that_does_not_say_that_it_lives_is_lost_though_nothing_was_asked_of_it(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, silence_s=0.05)
        roster = cast.roster(ScorerRoster)
        stopped = cast.started[0]
        stopped.health.remote = lambda: asyncio.Event().wait()  # type: ignore[method-assign]
        roster.keep_watch()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if len(cast.told) == 2:
                break
        assert "(supervision.silence_s) for reward 0 to say that it lives" in cast.told[0] and stopped.dead.is_set()
        assert cast.told[1] == "reward 0 serves again"
        roster.stop()

    asyncio.run(run())


class Nowhere:
    """A bundle whose node is gone, until `back`; the cluster does not answer at first."""

    back = False

    def __init__(self) -> None:
        self.unanswered = 3

    def has_node(self, role: str, index: int) -> bool:
        if self.unanswered > 0:
            self.unanswered -= 1
            raise RpcError("the control store is away")
        return self.back

    def wanting(self, role: str, index: int) -> str:
        return f"{role} {index}: 1 CPU. The cluster has nothing"


def test_an_actor_without_a_node_is_waited_for_and_costs_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.starting.PLACE_POLL_S", 0.01)

    async def run() -> None:
        cast, bundles = Cast(tmp_path, 2, max_restarts=1), Nowhere()
        roster = cast.roster(ScorerRoster)
        roster._places.bundles = bundles
        roster.lose(roster.serving[0], ActorDiedError())
        await asyncio.sleep(0.1)
        assert len(cast.started) == 2
        assert cast.told[1].startswith("no node has room for reward 0: 1 CPU. The cluster has nothing; 1 reward left")
        bundles.back = True
        await asyncio.sleep(0.1)
        assert cast.told[-1] == "reward 0 serves again" and len(roster.serving) == 2
        roster.stop()

    asyncio.run(run())


def test_a_successor_and_a_watch_that_end_with_an_error_are_told(tmp_path: Path) -> None:
    def refuse(incident: Any) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        cast = Cast(tmp_path, 2, silence_s=0.05)
        roster = cast.roster(ScorerRoster)
        with cast.incidents.recorded(refuse):
            roster.lose(roster.serving[0], ActorDiedError())
            await until(lambda: cast.told[-1].startswith("successor"))
            assert cast.told[-1] == "successor of reward 0 ended: OSError: [Errno 28] No space left on device"
            assert sorted(roster.serving) == [0, 1], "it serves for all that"
            roster._renew = None
            cast.started[1].dead.set()
            roster.keep_watch()
            await until(lambda: cast.told[-1].startswith("watch"))
            assert cast.told[-1].startswith("watch over reward ended: OSError")
        roster.stop()

    asyncio.run(run())
