"""Broadcasts against fake engines and a fake learner: who takes part, what a fault costs, what the next one does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_generators import CHECKSUM, Cast, Method
from ray.exceptions import ActorDiedError, RayTaskError

from actors.learner_gang import LearnerGang
from actors.learner_worker import WeightHeader
from actors.weight_transfer import BroadcastWeights, LearnerSender, SenderError
from medtvt_rl.config import Config
from medtvt_rl.faults import RoleLostError
from medtvt_rl.rollout.config import RolloutConfig
from medtvt_rl.weights import pack_weights

HEADER = pack_weights(1, [("w", torch.ones(4))]).header()
SHORT = {"update_timeout_s": 0.2}


class FakeSender:
    """The learner: counts, and fails as it is told. `together` is what engines saw at the time of its broadcast."""

    def __init__(self, cast: Cast) -> None:
        self.cast, self.groups, self.sent, self.closed = cast, list[Any](), list[str](), 0
        self.faults: dict[str, Exception] = {}
        self.hold = asyncio.Event()
        self.hold.set()

    async def address(self) -> tuple[str, int]:
        self._fail("address")
        return "10.0.0.1", 5000 + len(self.groups)

    async def open(self, group: Any) -> None:
        self.groups.append(group)
        self._fail("open")

    async def broadcast(self, buffer: Any) -> None:
        self.sent.append(buffer)
        await self.hold.wait()
        self._fail("broadcast")

    async def close(self) -> None:
        self.closed += 1
        self._fail("close")

    def _fail(self, call: str) -> None:
        if call in self.faults:
            raise self.faults[call]


def publish(cast: Cast, sender: Any, version: int, checksum: int = CHECKSUM) -> Any:
    buffer: Any = f"buffer {version}"
    weights = BroadcastWeights(buffer=buffer, header=HEADER, sender=sender)
    return cast.pool.update_weights(weights, version, checksum)


def test_engines_receive_beside_the_learner_and_the_group_is_kept(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3)
        sender = FakeSender(cast)
        for generator in cast.first:
            generator.gates["receive"].clear()
        sender.hold.clear()
        first = asyncio.create_task(publish(cast, sender, 1))
        await cast.settle()
        assert sender.sent == ["buffer 1"] and all(g.loaded == ["receive"] for g in cast.first), "both at once"
        for generator in cast.first:
            generator.gates["receive"].set()
        await cast.settle()
        assert not first.done(), "the learner has not sent it yet"
        sender.hold.set()
        await first
        await publish(cast, sender, 2)
        assert [g.versions for g in cast.first] == [[1, 2]] * 3 and sender.sent == ["buffer 1", "buffer 2"]
        assert [[offset for _, offset in g.joined] for g in cast.first] == [[1], [2], [3]]
        (group,) = sender.groups
        assert (group.address, group.port, group.world_size) == ("10.0.0.1", 5000, 4)
        assert all(g.joined[0][0] is group for g in cast.first) and not cast.told and sender.closed == 0

    asyncio.run(run())


def test_with_two_workers_an_engine_the_next_one_begins_behind_both(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3, tensor_parallel=2)
        sender = FakeSender(cast)
        await publish(cast, sender, 1)
        assert [g.joined[0][1] for g in cast.first] == [1, 3, 5] and sender.groups[0].world_size == 7

    asyncio.run(run())


def test_weights_without_a_sender_go_through_the_object_store(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        await cast.pool.update_weights("buffer", 1, CHECKSUM)  # type: ignore[arg-type]
        assert [g.loaded for g in cast.first] == [["update"]] * 2 and not cast.first[0].joined

    asyncio.run(run())


def test_a_new_member_catches_up_from_the_store_and_the_group_is_built_anew(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        sender = FakeSender(cast)
        await publish(cast, sender, 1)
        cast.first[1].fault = ActorDiedError()
        await asyncio.gather(*(cast.pool.stats() for _ in range(2)))
        await cast.settle()
        (successor,) = cast.successors[1]
        assert successor.loaded == ["update"] and successor.versions == [1]
        await publish(cast, sender, 2)
        assert successor.loaded == ["update", "receive"] and cast.first[0].loaded == ["receive", "receive"]
        old, new = sender.groups
        assert (old.port, new.port, new.world_size) == (5000, 5001, 3)
        assert [g.joined[-1] for g in (cast.first[0], successor)] == [(new, 1), (new, 2)]
        await publish(cast, sender, 3)
        assert len(sender.groups) == 2

    asyncio.run(run())


def test_another_learner_builds_its_own_group(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1)
        senders = [FakeSender(cast), FakeSender(cast)]
        for version, sender in enumerate(senders, start=1):
            await publish(cast, sender, version)
        assert [len(sender.groups) for sender in senders] == [1, 1]

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["dead", "broken", "raises"])
def test_who_does_not_answer_the_roll_call_keeps_nobody_waiting(tmp_path: Path, fault: str) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 3, replace=False)
        sender = FakeSender(cast)
        if fault == "dead":
            cast.first[1].dead.set()
        elif fault == "broken":
            cast.first[1].broken = "a step failed"
        else:
            cast.first[1].faults["health"] = RayTaskError("f", "traceback", ValueError("a step failed"))
        await publish(cast, sender, 1)
        assert sender.groups[0].world_size == 3 and [g.joined[0][1] for g in (cast.first[0], cast.first[2])] == [1, 2]
        assert cast.pool.num_left == 2 and not cast.first[1].loaded
        assert len(cast.told) == 1 and cast.told[0].startswith("rollout 1 is lost: ")
        assert {"dead": "ActorDied", "broken": "EngineBroken", "raises": "Value"}[fault] + "Error" in cast.told[0]

    asyncio.run(run())


def test_an_engine_lost_in_mid_broadcast_costs_the_group_but_not_the_version(tmp_path: Path) -> None:
    """Rollout 1 dies; 2 hangs with it, as in a ring; 0 had all bytes already. The learner gives up at its deadline."""

    async def run() -> None:
        cast = Cast(tmp_path, 3, **SHORT)
        sender = FakeSender(cast)
        await publish(cast, sender, 1)
        for generator in cast.first[1:]:
            generator.gates["receive"].clear()
        sender.faults["broadcast"] = SenderError("learner rank 0, asked to broadcast weights: waited 0.2 s")
        task = asyncio.create_task(publish(cast, sender, 2))
        await cast.settle()
        cast.first[1].dead.set()
        await task
        await cast.settle()
        lost, given_up = [line for line in cast.told if "is lost" in line], cast.told
        assert len([line for line in lost if line.startswith(("rollout 1 is lost: Actor", "rollout 2 is lost"))]) == 2
        (message,) = [line for line in given_up if "builds a new weight group" in line]
        assert message.startswith("weights of version 2 did not reach all: learner rank 0, asked to broadcast weights")
        assert "rollout 1 is lost" in message and "(rollout.update_timeout_s) for rollout 2 to load" in message
        assert sender.closed == 1 and cast.first[0].loaded == ["receive", "receive"]
        successors = [cast.successors[index][0] for index in (1, 2)]
        assert [s.loaded for s in successors] == [["update"]] * 2 and [s.versions for s in successors] == [[2]] * 2
        del sender.faults["broadcast"]
        await publish(cast, sender, 3)
        assert len(sender.groups) == 2 and sender.groups[1].port == 5001 and sender.groups[1].world_size == 4
        assert [s.loaded[-1] for s in successors] == ["receive"] * 2 and cast.pool.num_left == 3

    asyncio.run(run())


def test_engines_that_wait_in_vain_for_the_learner_are_replaced(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2, **SHORT)
        sender = FakeSender(cast)
        sender.faults["open"] = SenderError("learner rank 0, asked to build a weight group: OSError: address in use")
        for generator in cast.first:
            generator.gates["join"].clear()
        await publish(cast, sender, 1)
        await cast.settle()
        (message,) = [line for line in cast.told if "builds a new weight group" in line]
        assert message.startswith("the group of learner rank 0 and rollout 0, 1 was not built: learner rank 0, asked")
        assert "for rollout 1 to join the weight group at 10.0.0.1:5000" in message
        assert sender.sent == [] and cast.pool.num_left == 2
        assert [cast.successors[index][0].loaded for index in (0, 1)] == [["update"]] * 2

    asyncio.run(run())


@pytest.mark.parametrize("call", ["address", "close"])
def test_engines_that_never_began_to_wait_load_from_the_store(tmp_path: Path, call: str) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        sender = FakeSender(cast)
        sender.faults = {"address": SenderError("the learner is silent"), call: SenderError("the learner is silent")}
        await publish(cast, sender, 1)
        assert [g.loaded for g in cast.first] == [["update"]] * 2 and cast.pool.num_left == 2
        assert sender.closed == 1 and "the learner is silent" in cast.told[0]

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["join", "receive"])
def test_an_engine_that_is_refused_by_nccl_serves_on_with_weights_from_the_store(tmp_path: Path, kind: str) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        sender = FakeSender(cast)
        cause = RuntimeError("NCCL error: unhandled system error")
        cast.first[0].faults[kind] = RayTaskError("f", "traceback", cause)
        await publish(cast, sender, 1)
        assert cast.first[0].loaded[-1] == "update" and cast.pool.num_left == 2
        assert cast.first[1].loaded == (["update"] if kind == "join" else ["receive"])
        assert (
            len(cast.told) == 1 and "rollout 0, asked to" in cast.told[0] and "unhandled system error" in cast.told[0]
        )

    asyncio.run(run())


def test_an_engine_that_received_something_else_is_replaced(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 2)
        sender = FakeSender(cast)
        cast.first[0].checksum = 99
        await publish(cast, sender, 1)
        await cast.settle()
        assert "holds checksum 99 of version 1" in cast.told[0] and cast.pool.num_left == 2
        assert cast.successors[0][0].loaded == ["update"] and cast.first[1].loaded == ["receive"]
        await publish(cast, sender, 2)
        assert len(sender.groups) == 2

    asyncio.run(run())


def test_the_last_engine_lost_in_a_broadcast_ends_the_run(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, 1, replace=False)
        cast.first[0].faults["receive"] = ActorDiedError()
        with pytest.raises(RoleLostError, match="no rollout actor is left"):
            await publish(cast, FakeSender(cast), 1)

    asyncio.run(run())


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("generate_timeout_s", [20.0, 0.05])
def test_an_engine_that_finishes_its_requests_first_has_the_time_of_a_generation_besides(
    tmp_path: Path, broadcast: bool, generate_timeout_s: float
) -> None:
    async def run() -> None:
        settings = {"update_timeout_s": 0.05, "generate_timeout_s": generate_timeout_s}
        cast = Cast(tmp_path, 2, on_update="finish", **settings)
        sender, pool = FakeSender(cast), cast.pool
        gate = cast.first[1].gates["receive" if broadcast else "update"]
        gate.clear()
        weights: Any = "buffer 1"
        publication = publish(cast, sender, 1) if broadcast else pool.update_weights(weights, 1, CHECKSUM)
        asyncio.get_running_loop().call_later(0.3, gate.set)
        await publication
        await cast.settle()
        assert cast.first[1].dead.is_set() == (generate_timeout_s < 1)
        if generate_timeout_s < 1:
            assert "waited 0.1 s (rollout.update_timeout_s + generate_timeout_s) for rollout 1 to load" in cast.told[0]

    asyncio.run(run())


class FakeWorker:
    """Rank 0; `answer` is what every method gives, or raises."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Method:
        return Method(lambda *arguments: self._give(name, arguments))

    async def _give(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.asked.append((name, *arguments))
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer == "hang":
            await asyncio.sleep(60)
        return self._answer


def test_the_sender_asks_rank_0_and_names_it_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        worker, buffer, group = FakeWorker(("10.0.0.1", 4711)), Any, Any
        sender = LearnerSender(worker, RolloutConfig())
        assert await sender.address() == ("10.0.0.1", 4711)
        await sender.open(group)  # type: ignore[arg-type]
        await sender.broadcast(buffer)  # type: ignore[arg-type]
        await sender.close()
        names = ["address", "open_weight_group", "broadcast_weights", "close_weight_group"]
        assert [name for name, *_ in worker.asked] == names
        failing = LearnerSender(FakeWorker(RayTaskError("f", "t", ValueError("no room"))), RolloutConfig())
        with pytest.raises(SenderError, match="learner rank 0, asked to broadcast weights: ValueError: no room"):
            await failing.broadcast(buffer)  # type: ignore[arg-type]
        monkeypatch.setattr("actors.weight_transfer.SENDER_GRACE_S", 0.05)
        silent = LearnerSender(FakeWorker("hang"), RolloutConfig(update_timeout_s=0.05))
        with pytest.raises(SenderError, match=r"0\.1 s \(rollout\.update_timeout_s\) for learner rank 0 to build"):
            await silent.open(group)  # type: ignore[arg-type]
        busy = RolloutConfig(on_update="finish", update_timeout_s=0.05, generate_timeout_s=0.1)
        with pytest.raises(SenderError, match=r"0\.2 s \(rollout\.update_timeout_s \+ generate_timeout_s\) for"):
            await LearnerSender(FakeWorker("hang"), busy).broadcast(buffer)  # type: ignore[arg-type]

    asyncio.run(run())


@pytest.mark.parametrize("broadcast", [False, True])
def test_an_export_carries_what_its_transport_needs(broadcast: bool) -> None:
    async def run() -> None:
        contents = HEADER if broadcast else None

        class Worker:
            def __init__(self) -> None:
                self.export = Method(lambda version: (self._header(version), f"buffer {version}"))

            async def _header(self, version: int) -> WeightHeader:
                return WeightHeader(version=version, checksum=7, num_bytes=16, seconds=0.0, contents=contents)

        gang = LearnerGang(Config(), [Worker()])
        first, checksum = await gang.export(1)
        second, _ = await gang.export(2)
        assert checksum == 7
        if broadcast:
            assert isinstance(first, BroadcastWeights) and isinstance(second, BroadcastWeights)
            assert (first.buffer, first.header) == ("buffer 1", HEADER) and first.sender is second.sender
        else:
            assert first == "buffer 1"

    asyncio.run(run())
