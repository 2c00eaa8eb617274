"""The reward scorers and the reference policies as the driver sees them: pools whose actors do one group at a time.

A group goes to an actor only when that has nothing else to do, so that one that dies or hangs takes no other group with
it, and it is known which group it was.

Owns: whose turn it is, deadlines, that a group is asked again of another actor. Does not own: rewards and log-probs
(actors/reward_scorer.py, actors/reference_policy.py), or losses and successors (actors/roster.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import ray

from actors.keeping import Keep, as_it_is, keep_here
from actors.member import Member
from actors.placement import Placement
from actors.reference_policy import ReferencePolicy
from actors.reward_scorer import RewardScorer
from actors.roster import Roster
from actors.starting import started
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import ReferenceHeader

T = TypeVar("T")
WHAT = "score a group"


class ScorerRoster(Roster):
    """The reward scorers that serve."""

    role = "reward"


class ReferenceRoster(Roster):
    """The reference policies that serve."""

    role = "reference"


async def ask_alone(
    config: Config, roster: Roster, call: Callable[[Any], Awaitable[T]], is_finite: Callable[[T], bool]
) -> T:
    """What an actor that has nothing else to do makes of a group; raises what Roster.ask_in_turn raises."""

    async def pick(doubted: Sequence[Member]) -> Member:
        waited = False
        while True:
            await roster.wait_for_one(WHAT)
            free = [member for member in roster.serving.values() if member.load == 0]
            others = [member for member in free if member not in doubted] if doubted else free
            if others or (free and all(member in doubted for member in roster.serving.values())):
                member = min(others or free, key=lambda member: member.index)
                member.load = member.groups = 1
                return member
            # Whoever is choosy may not keep a free actor from those behind it.
            await (roster.change() if doubted else roster.turns.wait(first=waited))
            waited = True

    async def ask(member: Member) -> T:
        try:
            answer = call(member.handle)
            return await roster.ask(member, answer, WHAT, config.score_timeout_s, "score_timeout_s")
        finally:
            member.load = member.groups = 0
            roster.freed()

    return await roster.ask_in_turn(WHAT, pick, ask, is_finite)


class GroupPool:
    """Actors of one role that do one group at a time.

    Their class has `ready() -> Whereabouts`, `health()` in a concurrency group of its own, and its log in
    logs/ROLE_INDEX.log.
    """

    roster_kind: ClassVar[type[Roster]] = Roster

    def __init__(self, config: Config, roster: Roster) -> None:
        self._config, self._roster = config, roster

    @classmethod
    async def launch(
        cls,
        config: Config,
        placement: Placement,
        incidents: Incidents,
        timeline: Timeline,
        make: Callable[[int, dict[str, Any]], Any],
    ) -> Self:
        """Starts an actor in every bundle of the role; returns when all are ready.

        Args:
            make: f(index, options) -> a new actor, made with these options of Ray.

        Raises:
            ActorError: one did not start, or not in time, with the end of its log.
        """
        role = cls.roster_kind.role

        def renew(index: int) -> Any:
            return make(index, placement.options(role, index))

        handles = [renew(index) for index in range(placement.count(role))]
        starts = [started(config, role, index, each, each.ready.remote()) for index, each in enumerate(handles)]
        members = await asyncio.gather(*starts)
        roster = cls.roster_kind(config, members, incidents, renew, timeline=timeline, bundles=placement)
        roster.keep_watch()
        return cls(config, roster)

    async def ask(self, call: Callable[[Any], Awaitable[T]], is_finite: Callable[[T], bool] = lambda _: True) -> T:
        """What an actor makes of a group: one that hangs, dies or is sick is replaced, and the group asked of another.

        Args:
            call: f(handle) -> the answer that is waited for.
        """
        return await ask_alone(self._config, self._roster, call, is_finite)

    @property
    def serving(self) -> list[int]:
        """Numbers of the actors that serve."""
        return sorted(self._roster.serving)

    def move(self, index: int, why: str, timeout_s: float, anew: Callable[[], None]) -> None:
        """Takes an actor off its node and starts it elsewhere, see Roster.move."""
        self._roster.move(index, why, timeout_s, anew)

    def stop(self) -> None:
        """Ends every actor."""
        self._roster.stop()


class ScorerPool(GroupPool):
    """The reward scorers."""

    roster_kind = ScorerRoster

    @classmethod
    async def start(
        cls, config: Config, placement: Placement, model_folder: Path, incidents: Incidents, timeline: Timeline
    ) -> ScorerPool:
        """Starts every scorer in its bundle; returns when all have their tokenizer and reward functions."""
        actor: Any = RewardScorer

        def make(index: int, options: dict[str, Any]) -> Any:
            return actor.options(**options).remote(config, str(model_folder), index)

        return await cls.launch(config, placement, incidents, timeline, make)

    async def score(self, group: ray.ObjectRef) -> GroupRewards:
        """Rewards of one group."""
        return await self.ask(lambda scorer: scorer.score.remote(group))


class ReferencePool(GroupPool):
    """The reference policies.

    Args:
        keep: brings log-probs to this node, see keeping.py.
    """

    roster_kind = ReferenceRoster

    def __init__(self, config: Config, roster: Roster, keep: Keep = as_it_is) -> None:
        super().__init__(config, roster)
        self._keep = keep

    @classmethod
    async def start(
        cls, config: Config, placement: Placement, model_folder: Path, incidents: Incidents, timeline: Timeline
    ) -> ReferencePool:
        """Starts every reference in its bundle; returns when all have loaded `model_folder`."""
        actor: Any = ReferencePolicy

        def make(index: int, options: dict[str, Any]) -> Any:
            seen = placement.seen_from(config, "reference", index)
            return actor.options(**options).remote(str(model_folder), seen, index)

        pool = await cls.launch(config, placement, incidents, timeline, make)
        pool._keep = keep_here
        return pool

    async def logprobs(self, group: ray.ObjectRef) -> tuple[ray.ObjectRef, ReferenceHeader]:
        """A reference to the log-probs of one group, and what the driver sees of them."""

        async def call(reference: Any) -> tuple[ray.ObjectRef, ReferenceHeader]:
            answer, payload = reference.logprobs.remote(group)
            header = await answer
            return await self._keep(payload), header

        return await self.ask(call, lambda answer: answer[1].finite)
