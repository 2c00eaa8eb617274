"""The rollout generators as the driver sees them: one object that generates groups and takes new weights.

Owns: asking the generator whose turn it is, and the parts of a group that is too large for one. Does not own: whose
turn it is (medtvt_rl/rollout/balance.py), admission (medtvt_rl/rollout/buffer.py), the engines
(actors/rollout_generator.py), how weights reach them (actors/weight_transfer.py), or who serves and what becomes of a
lost one (actors/generator_roster.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.generator_roster import ExportAgain, GeneratorRoster
from actors.keeping import Keep, as_it_is, keep_here
from actors.member import Bundles, Member, MemberLostError
from actors.placement import Placement
from actors.rollout_generator import RolloutGenerator
from actors.spares import Spares
from actors.starting import started
from actors.supervision import Incidents
from actors.timeline import Timeline
from actors.weight_transfer import BroadcastWeights, WeightTransfer
from medtvt_rl.config import Config
from medtvt_rl.rollout.balance import Balance, Share
from medtvt_rl.rollout.parts import split_group
from medtvt_rl.rollout.pending import Wave
from medtvt_rl.types import GroupHeader, Prompt

logger = logging.getLogger(__name__)

Answer = tuple[GroupHeader, ray.ObjectRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a part of a group is made; None: by whoever has least to do, at once."""

    part: range
    member: Member | None
    wave: Wave | None


class RolloutPool:
    """All rollout generators of a run.

    Args:
        members: started generators; the place of each is its index among its kind.
        incidents: told what becomes of a generator that is lost.
        renew: makes a new actor in the bundle of an index; without it a lost generator is left out for good.
        kill: ends the process behind a handle.
        timeline: where every call is recorded.
        bundles: asked before a successor is started.
        spares: processes with their imports done; a successor that serves gets one beside it.
        keep: brings what a generator made to this node, see keeping.py.

    Every method raises RoleLostError when no generator serves and none will, with the cause of each.
    """

    def __init__(
        self,
        config: Config,
        members: Sequence[Member],
        incidents: Incidents,
        renew: Callable[[int], Any] | None = None,
        kill: Callable[[Any], None] = ray.kill,
        timeline: Timeline | None = None,
        bundles: Bundles | None = None,
        spares: Spares | None = None,
        keep: Keep = as_it_is,
    ) -> None:
        self._config, self._spares, self._keep = config.rollout, spares, keep
        self._max_attempts = config.supervision.max_attempts
        self._balance = Balance(config.rollout.by_speed(config.grpo.max_staleness))
        served = self._successor_serves
        self._roster = GeneratorRoster(config, members, incidents, renew, kill, timeline, bundles, spares, served)
        self._transfer = WeightTransfer(self._roster, config.rollout, incidents.report)
        self._seats: dict[int, list[Seat]] = {}
        self._waves = count(1)

    @classmethod
    async def start(
        cls,
        config: Config,
        placement: Placement,
        model_folder: Path,
        incidents: Incidents | None = None,
        timeline: Timeline | None = None,
        with_spares: bool = False,
    ) -> RolloutPool:
        """Starts every generator in its bundle and waits until its engine has loaded `model_folder`; `with_spares` as
        `rollout.spares` says."""
        actor: Any = RolloutGenerator
        settings = config.rollout

        def make(index: int, spare: bool = False) -> Any:
            options = placement.options("rollout", index, spare)
            return actor.options(**options).remote(
                str(model_folder), placement.seen_from(config, "rollout", index), index
            )

        spares = Spares(
            "rollout",
            settings.spares if with_spares else 0,
            lambda index: make(index, spare=True),
            settings.start_timeout_s,
            "rollout.start_timeout_s",
        )
        generators = {index: make(index) for index in placement.indices("rollout")}
        starts = [started(config, "rollout", index, each, each.start.remote()) for index, each in generators.items()]
        members = await asyncio.gather(*starts)
        told = incidents or Incidents(logger.warning)
        pool = cls(
            config,
            members,
            told,
            make,
            timeline=timeline,
            bundles=placement,
            spares=spares,
            keep=keep_here,
        )
        pool._roster.keep_watch()
        for member in members:
            pool._order_spare(member)
        return pool

    def _successor_serves(self, member: Member) -> None:
        self._balance.started_anew(member.index)
        self._order_spare(member)

    def _order_spare(self, member: Member) -> None:
        if self._spares is not None and member.where is not None:
            self._spares.order(member.index, member.where)

    @property
    def serving(self) -> list[int]:
        """Numbers of the generators that serve."""
        return sorted(self._roster.serving)

    @property
    def on_their_way(self) -> set[int]:
        """Numbers of the generators that will serve, successors included."""
        return self._roster.on_their_way

    async def add(self, index: int) -> bool:
        """Starts one more generator in its bundle, which has its place; whether it serves. It holds the newest weights
        then."""
        if self._spares is not None:
            self._spares.drop(index)  # that of one before, which went with its bundle
        return await self._roster.join(index)

    async def remove(self, index: int) -> None:
        """Takes a generator out; returns when it has done what it had begun, and has ended."""
        if self._spares is not None:
            self._spares.drop(index)
        await self._roster.retire(index, self._config.generate_timeout_s)

    def move(self, index: int, why: str, timeout_s: float, anew: Callable[[], None]) -> None:
        """Takes a generator off its node and starts it elsewhere, see Roster.move; its spare would go with the node."""
        if self._spares is not None:
            self._spares.drop(index)
        self._roster.move(index, why, timeout_s, anew)

    @property
    def num_left(self) -> int:
        """Generators that serve."""
        return len(self._roster.serving)

    def together(self, group_ids: Sequence[int], num_completions: int) -> None:
        """These groups are asked for next: who makes which is settled now, and each engine begins with its share when
        all of it has arrived, in id order. What reaches an engine is then the same in every run."""
        load = self._loads()
        planned: list[tuple[int, range, Member]] = []
        for group_id in group_ids:
            parts = self._parts(num_completions)
            for part, index in zip(parts, self._balance.order(load, len(parts[0]))):
                load[index] += len(part)
                planned.append((group_id, part, self._roster.serving[index]))
        sizes = Counter(member.index for _, _, member in planned)
        waves = {index: Wave(number=next(self._waves), size=size) for index, size in sizes.items()}
        for group_id, part, member in planned:
            self._seats.setdefault(group_id, []).append(Seat(part=part, member=member, wave=waves[member.index]))

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool = False) -> Answer:
        """One group from the generators with the fewest completions under way: its header, and a reference to it.

        A group larger than `rollout.max_completions_per_engine` is generated in parts by several generators and put
        together by one of them. A part whose generator is lost goes to another one, or to the successor where none is
        left, with the same seeds.
        """
        seats = self._seats.pop(group_id, None) or self._free_seats(num_completions)
        if len(seats) == 1:
            return await self._part(prompt, group_id, seats[0], greedy)
        made = await asyncio.gather(*(self._part(prompt, group_id, seat, greedy) for seat in seats))
        seconds, payloads = max(header.generate_s for header, _ in made), [payload for _, payload in made]
        return await self._with_payload(
            lambda handle: handle.merge.remote(seconds, *payloads), f"merge the parts of group {group_id}"
        )

    def _parts(self, num_completions: int) -> list[range]:
        return split_group(num_completions, self._config.engine_share, len(self._roster.serving))

    def _free_seats(self, num_completions: int) -> list[Seat]:
        """Parts for those with least to do; a whole group goes to whoever has when its turn comes."""
        parts = self._parts(num_completions)
        if len(parts) == 1:
            return [Seat(part=parts[0], member=None, wave=None)]
        members = self._by_turn(len(parts[0]))
        return [Seat(part=part, member=member, wave=None) for part, member in zip(parts, members)]

    def _loads(self) -> dict[int, int]:
        return {index: member.load for index, member in self._roster.serving.items()}

    def _by_turn(self, size: int) -> list[Member]:
        """The generators that serve, the one whose turn it is to make so many completions first."""
        return [self._roster.serving[index] for index in self._balance.order(self._loads(), size)]

    async def _part(self, prompt: Prompt, group_id: int, seat: Seat, greedy: bool) -> Answer:
        """The completions of one seat; a second generator, where the first is lost, begins at once."""
        waves = iter([seat.wave])

        def call(handle: Any) -> Any:
            size, first = len(seat.part), seat.part.start
            return handle.generate.remote(prompt, group_id, size, greedy, first_index=first, wave=next(waves, None))

        return await self._with_payload(call, f"generate group {group_id}", load=len(seat.part), first=seat.member)

    async def _with_payload(
        self,
        call: Callable[[Any], tuple[Awaitable[Any], ray.ObjectRef]],
        what: str,
        load: int = 0,
        first: Member | None = None,
    ) -> Answer:
        """A header and a reference to its payload, from another generator where the first is lost or not finite."""
        timeout_s, setting = self._config.generate_timeout_s, "rollout.generate_timeout_s"
        firsts = iter([] if first is None else [first])

        async def kept(header: Awaitable[Any], payload: ray.ObjectRef) -> Answer:
            return await header, await self._keep(payload)

        async def pick(doubted: Sequence[Member]) -> Member:
            if (settled := next(firsts, None)) is not None:
                return settled
            await self._roster.wait_for_one(what)
            members = self._by_turn(load)
            return next((member for member in members if member not in doubted), members[0])

        async def ask(member: Member) -> Answer:
            member.load, member.groups = member.load + load, member.groups + 1
            tokens = 0
            if load:
                self._balance.begin(member.index)
            try:
                answer: Answer = await self._roster.ask(member, kept(*call(member.handle)), what, timeout_s, setting)
                tokens = sum(answer[0].lengths)
                return answer
            finally:
                member.load, member.groups = member.load - load, member.groups - 1
                if load:
                    self._balance.end(member.index, tokens)

        return await self._roster.ask_in_turn(what, pick, ask, lambda answer: answer[0].finite)

    async def update_weights(self, weights: ray.ObjectRef | BroadcastWeights, version: int, checksum: int) -> None:
        """Publishes one version; every engine that serves from now on holds it.

        One that reports another checksum, or is late, is not trusted: it is killed, and its successor loads the newest
        weights before it serves.
        """
        await self._transfer.publish(weights, version, checksum)
        self._roster.require_one()

    def ask_learner(self, export_again: ExportAgain) -> None:
        """From now on weights that go down with the learner's node are exported again."""
        self._roster.export_again = export_again

    async def score(self, group: ray.ObjectRef, index: int) -> list[NDArray[np.float32]]:
        """Log-probs [T] of one completion at temperature 1, of every engine."""
        timeout_s, setting = self._config.generate_timeout_s, "rollout.generate_timeout_s"
        return await self._all_left(
            lambda handle: handle.score.remote(group, index), "score a completion", timeout_s, setting
        )

    async def stats(self) -> list[dict[str, float]]:
        """Each engine's counters (tokens, busy and idle seconds)."""
        timeout_s, setting = self._config.update_timeout_s, "rollout.update_timeout_s"
        return await self._all_left(
            lambda handle: handle.stats.remote(),
            "give its statistics",
            timeout_s,
            setting,
            lambda member, answer: {**answer, "generator": float(member.index)},
        )

    def shares(self) -> list[Share]:
        """What each generator did of the whole, those that have left included."""
        return self._balance.shares()

    def slowest(self) -> int:
        """Which of those that serve is best gone without."""
        return self._balance.slowest(self.serving)

    def stop(self) -> None:
        """Ends every generator."""
        self._roster.stop()
        if self._spares is not None:
            self._spares.stop()

    async def _all_left(
        self,
        call: Callable[[Any], Awaitable[Any]],
        what: str,
        timeout_s: float,
        setting: str,
        mark: Callable[[Member, Any], Any] = lambda member, answer: answer,
    ) -> list[Any]:
        """Answers of the generators that serve, one at least; asked as often as a group is where all are lost at it."""

        async def ask(member: Member) -> Any:
            return mark(member, await self._roster.ask(member, call(member.handle), what, timeout_s, setting))

        lost: list[Exception] = []
        for _ in range(self._max_attempts):
            await self._roster.wait_for_one(what)
            answers = await self._roster.everywhere(ask)
            found = [answer for answer in answers if not isinstance(answer, MemberLostError)]
            if found:
                return found
            lost = answers
        raise lost[-1]
