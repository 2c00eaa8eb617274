"""How a published version reaches the engines: through the object store, or by one broadcast between GPUs.

    object store: every engine fetches the buffer
    broadcast:    roll call -> same members as last time? else a new group on a new port
                  -> the learner sends beside the engines that receive -> who has not got it fetches the buffer

All or nothing: a group that one member failed in is given up, and the next publication builds another with whoever
serves then. An engine that hangs in it is lost, like any that is late.

Owns: both ways, the group's members and ranks. Does not own: the communicators (medtvt_rl/learner/nccl_sender.py,
medtvt_rl/model/vllm_receiver.py), loading (medtvt_rl/rollout), lost engines and their successors
(actors/generator_roster.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.failure import ActorError, ArgumentLostError, cause_of
from actors.generator_roster import GeneratorRoster, Publication, WeightSyncError
from actors.member import Member, MemberLostError
from medtvt_rl.rollout.config import RolloutConfig
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.weight_group import WeightGroup, rank_offsets
from medtvt_rl.weights import WeightBuffer

TIMEOUT = "rollout.update_timeout_s"
SENDER_GRACE_S = 10.0
"""The learner holds the deadline itself, so as to leave the group; this much later it is held to be silent."""


class SenderError(RuntimeError):
    """The learner did not do its part."""


class Sender(Protocol):
    """The learner's part; every method raises SenderError where it fails or is late."""

    async def address(self) -> tuple[str, int]:
        """Where the next group may meet: the learner's node and a free port."""

    async def open(self, group: WeightGroup) -> None:
        """Joins a group as rank 0."""

    async def broadcast(self, buffer: ray.ObjectRef) -> None:
        """Sends the data of a WeightBuffer to the group."""

    async def close(self) -> None:
        """Leaves the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastWeights:
    """Weights that are to be broadcast.

    Attributes:
        buffer: reference to the whole WeightBuffer. It costs the learner's node one copy of the weights in memory, and
            lets an engine catch up at any time; nothing of it crosses the network for those who get the broadcast.
        header: the same without its data.
        sender: the same object from one publication to the next, as long as the learner is the same.
    """

    buffer: ray.ObjectRef
    header: WeightBuffer
    sender: Sender


class LearnerSender:
    """Rank 0 of the learner gang as a Sender."""

    def __init__(self, worker: Any, config: RolloutConfig) -> None:
        self._worker, self._config = worker, config

    async def address(self) -> tuple[str, int]:
        """See Sender."""
        return await self._call("name a free port", "address")

    async def open(self, group: WeightGroup) -> None:
        """See Sender."""
        await self._call("build a weight group", "open_weight_group", group)

    async def broadcast(self, buffer: ray.ObjectRef) -> None:
        """See Sender."""
        timeout_s, setting = self._config.publication_timeout_s, self._config.publication_timeout
        await self._call("broadcast weights", "broadcast_weights", buffer, timeout_s=timeout_s, setting=setting)

    async def close(self) -> None:
        """See Sender."""
        await self._call("leave the weight group", "close_weight_group")

    async def _call(
        self, what: str, method: str, *arguments: Any, timeout_s: float | None = None, setting: str = TIMEOUT
    ) -> Any:
        seconds = (self._config.update_timeout_s if timeout_s is None else timeout_s) + SENDER_GRACE_S
        try:
            answer = getattr(self._worker, method).remote(*arguments)
            return await within(answer, seconds, f"learner rank 0 to {what}", setting)
        except DeadlineError as error:
            raise SenderError(str(error)) from error
        except RayError as error:
            raise SenderError(f"learner rank 0, asked to {what}: {cause_of(error)}") from error


class WeightTransfer:
    """Brings each version to every engine of a roster.

    Args:
        report: told in one line what became of a group that is given up.
    """

    def __init__(self, roster: GeneratorRoster, config: RolloutConfig, report: Callable[[str], None]) -> None:
        self._roster, self._config, self._report = roster, config, report
        self._joined: tuple[Sender, tuple[Member, ...]] | None = None

    async def publish(self, weights: ray.ObjectRef | BroadcastWeights, version: int, checksum: int) -> None:
        """Every engine that serves from now on holds the version.

        One that reports another checksum, or is late, is lost; its successor loads the newest weights by itself.
        """
        buffer = weights.buffer if isinstance(weights, BroadcastWeights) else weights
        # First of all, so that a successor that comes up meanwhile ends with this version.
        publication = self._roster.publication = Publication(weights=buffer, version=version, checksum=checksum)
        members, held = tuple(self._roster.serving.values()), list[Member]()
        if isinstance(weights, BroadcastWeights):
            members = await self._roll_call()
            held = await self._broadcast(weights, publication, members)
        rest = [member for member in members if member not in held and self._serves(member)]
        await self._roster.everywhere(lambda member: self._catch_up(member, publication), rest)

    async def _roll_call(self) -> tuple[Member, ...]:
        """Those that serve and answer: one that died since it was last asked would let all others wait in vain."""
        await self._roster.everywhere(self._present)
        return tuple(self._roster.serving.values())

    async def _present(self, member: Member) -> None:
        try:
            health = await self._ask(member, member.handle.health.remote(), "answer the roll call")
        except MemberLostError:
            raise
        except ActorError as error:
            raise self._roster.lose(member, error) from error
        if not health["ok"]:
            raise self._roster.lose(member, EngineBrokenError(health["broken"]))

    async def _broadcast(
        self, weights: BroadcastWeights, publication: Publication, members: tuple[Member, ...]
    ) -> list[Member]:
        """The members that hold the version after a broadcast, which may be none."""
        if not members:
            return []
        sender = weights.sender
        if self._joined != (sender, members):
            faults = await self._build(sender, members)
            if faults:
                await self._give_up(sender, f"the group of {_names(members)} was not built", faults)
                return []
        # Whatever ends this early leaves the group in a state that nobody knows.
        self._joined = None
        answers = await asyncio.gather(
            self._sent(sender.broadcast(weights.buffer)),
            *(self._received(member, self._load(member, weights.header, publication)) for member in members),
        )
        faults = [fault for fault in answers if fault is not None]
        if faults:
            await self._give_up(sender, f"weights of version {publication.version} did not reach all", faults)
        else:
            self._joined = (sender, members)
        return [member for member, fault in zip(members, answers[1:]) if fault is None]

    async def _build(self, sender: Sender, members: tuple[Member, ...]) -> list[str]:
        """A group of the learner and these members; what went wrong, of each that failed."""
        sizes = [self._config.tensor_parallel] * len(members)
        try:
            address, port = await sender.address()
        except SenderError as error:
            return [str(error)]
        group = WeightGroup(address=address, port=port, world_size=1 + sum(sizes))

        def join(member: Member, offset: int) -> Awaitable[None]:
            answer = member.handle.join_weight_group.remote(group, offset)
            return self._ask(member, answer, f"join the weight group at {address}:{port}")

        answers = await asyncio.gather(
            self._sent(sender.open(group)),
            *(self._received(member, join(member, offset)) for member, offset in zip(members, rank_offsets(sizes))),
        )
        return [fault for fault in answers if fault is not None]

    async def _give_up(self, sender: Sender, what: str, faults: Sequence[str]) -> None:
        """Leaves a group, so that the next publication builds another."""
        self._report(f"{what}: {'; '.join(faults)}; the next publication builds a new weight group")
        if fault := await self._sent(sender.close()):
            self._report(fault)

    async def _sent(self, part: Awaitable[None]) -> str | None:
        """None where the learner did its part, else why not."""
        try:
            await part
        except SenderError as error:
            return str(error)
        return None

    async def _received(self, member: Member, part: Awaitable[None]) -> str | None:
        """None where an engine did its part, else why not: it is lost, or refused and serves on as it was."""
        try:
            await part
        except (MemberLostError, ActorError) as error:
            return str(error).splitlines()[0]
        return None

    async def _catch_up(self, member: Member, publication: Publication) -> None:
        """One engine takes the whole buffer, another one where that is lost; it is lost where it refuses."""
        while True:
            try:
                return await self._load(member, publication.weights, publication)
            except MemberLostError:
                raise
            except ActorError as error:
                if not isinstance(error, ArgumentLostError) or self._roster.export_again is None:
                    raise self._roster.lose(member, error) from error
            publication = await self._roster.published_again(publication)

    async def _load(self, member: Member, weights: Any, publication: Publication) -> None:
        """One engine takes a whole buffer, or a header whose data comes from the group."""
        answer = member.handle.update_weights.remote(weights, publication.version)
        what, timeout_s = f"load weights of version {publication.version}", self._config.publication_timeout_s
        found = await self._ask(member, answer, what, timeout_s, self._config.publication_timeout)
        try:
            publication.check(member.index, found)
        except WeightSyncError as error:
            raise self._roster.lose(member, error) from error

    async def _ask(
        self, member: Member, answer: Awaitable[Any], what: str, timeout_s: float | None = None, setting: str = TIMEOUT
    ) -> Any:
        """The answer of an engine, which is lost if it is late, however busy it may be."""
        seconds = self._config.update_timeout_s if timeout_s is None else timeout_s
        try:
            return await self._roster.ask(member, answer, what, seconds, setting)
        except DeadlineError as error:
            raise self._roster.lose(member, error) from error

    def _serves(self, member: Member) -> bool:
        return self._roster.serving.get(member.index) is member


def _names(members: Sequence[Member]) -> str:
    return "learner rank 0 and rollout " + ", ".join(str(member.index) for member in members)
