"""The way back of a gang that failed: from which checkpoint, by which steps, to which weights, and when it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from actors.learner_gang import LearnerError
from actors.learner_supervisor import LearnerSupervisor, OutOfReachError, StepNote
from actors.supervision import Incidents
from medtvt_rl.config import Config, RunConfig, SupervisionConfig
from medtvt_rl.faults import RoleLostError
from medtvt_rl.types import LearnerStep


class FakeGang:
    """Its weights are the steps that they have seen, their checksum a hash of those."""

    where: ClassVar[list[Any]] = []

    def __init__(self, cast: Cast) -> None:
        self.cast, self.seen, self.dead = cast, list[int](), False
        self.calls: list[str] = []

    async def train_step(self, groups: list[int], learning_rate: float, version: int) -> LearnerStep:
        await self._called(f"train {version}")
        if version in self.cast.skipped:
            return LearnerStep(metrics={"updates": 0.0}, skipped="not finite")
        self.seen.append(version)
        self.cast.records.add(version)
        return LearnerStep(metrics={"updates": 1.0})

    async def replay_step(self, step: int) -> None:
        await self._called(f"replay {step}")
        assert step in self.cast.records
        self.seen.append(step + (100 if self.cast.damaged else 0))

    async def export(self, version: int) -> tuple[str, int]:
        await self._called(f"export {version}")
        return f"weights of {self.seen}", hash(tuple(self.seen))

    async def snapshot(self) -> bool:
        await self._called("save")
        self.cast.checkpoints[self.cast.version] = list(self.seen)
        return True

    async def load_checkpoint(self, folder: str) -> None:
        await self._called("load")
        self.seen = list(self.cast.checkpoints[int(folder)])

    def stop(self) -> None:
        self.dead = True

    async def _called(self, call: str) -> None:
        self.calls.append(call)
        await asyncio.sleep(0)
        if self.cast.fail_at and self.cast.fail_at[0] == call:
            self.cast.fail_at.pop(0)
            self.stop()
            raise LearnerError(f"learner rank 1 of 2, {call}: it died", rank=1, node="10.0.0.7", cause=f"{call}: died")


class Cast:
    """Gangs in the order of their start; `fail_at` names the calls that fail, each once."""

    def __init__(self, tmp_path: Path, *fail_at: str, record_steps: bool = True, **settings: Any) -> None:
        self.config = Config(run=RunConfig(name="r", root=str(tmp_path)), supervision=SupervisionConfig(**settings))
        self.config.grpo.record_steps = record_steps
        self.fail_at, self.skipped, self.damaged = list(fail_at), set[int](), False
        self.unanswered, self.hangs = 0, threading.Event()
        self.hangs.set()
        self.records, self.checkpoints, self.version = set[int](), dict[int, list[int]](), 0
        self.gangs: list[FakeGang] = [FakeGang(self)]
        self.told: list[str] = []
        self.incidents = Incidents(self.told.append)
        first: Any = self.gangs[0]
        self.learner: Any = LearnerSupervisor(self.config, self._start, first, self, {}, self.incidents)

    async def _start(self) -> Any:
        self.gangs.append(FakeGang(self))
        await self.gangs[-1]._called("start")
        return self.gangs[-1]

    def newest(self, version: int) -> tuple[str, int] | None:
        self.hangs.wait(20)
        if self.unanswered > 0:
            self.unanswered -= 1
            raise OutOfReachError("ClientError: 503 Slow Down")
        known = [each for each in self.checkpoints if each <= version]
        return (str(max(known)), max(known)) if known else None

    async def run(self, steps: int = 6, checkpoint_every: int = 2) -> list[int]:
        """The checksums of a loop."""
        found = []
        for step in range(steps):
            await self.learner.train_step([1, 2, 3], 1e-3, step)
            self.version = step + 1
            found.append((await self.learner.export(step + 1))[1])
            if self.version % checkpoint_every == 0:
                await self.learner.snapshot()
        return found


@pytest.mark.parametrize(
    ("fail_at", "way"),
    [
        ("train 0", ["start", "train 0", "export 1"]),
        ("train 1", ["start", "replay 0", "export 1", "train 1"]),
        ("export 1", ["start", "replay 0", "export 1"]),
        ("train 5", ["start", "load", "export 4", "train 4"]),
        ("export 6", ["start", "load", "replay 4", "replay 5", "export 6"]),
    ],
)
def test_a_gang_that_fails_anywhere_is_followed_by_one_with_the_same_weights(
    tmp_path: Path, fail_at: str, way: list[str]
) -> None:
    async def run() -> None:
        undisturbed = await Cast(tmp_path).run()
        cast = Cast(tmp_path, fail_at)
        assert await cast.run() == undisturbed
        assert len(cast.gangs) == 2 and cast.gangs[0].dead
        if fail_at == "train 5":
            way[:] = ["start", "load", "replay 4", "export 5", "train 5"]
        assert cast.gangs[1].calls[: len(way)] == way
        (incident,) = cast.incidents.over
        assert (incident.role, incident.index, incident.node) == ("learner", 1, "10.0.0.7")
        assert incident.outcome == "replaced" and incident.groups == (3 if "train" in fail_at else 0)
        assert cast.told[0] == f"learner is lost: {fail_at}: died; it is started again"
        assert cast.told[1].startswith("learner goes on after")

    asyncio.run(run())


def test_a_failure_on_the_way_back_and_a_skipped_step_change_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, "train 3", "start", "load", "replay 2")
        cast.skipped = {0}
        found = await cast.run()
        assert cast.gangs[-1].seen == [1, 2, 3, 4, 5] and len(cast.gangs) == 5 and len(set(found)) == 6
        assert all(gang.dead for gang in cast.gangs[:2] + cast.gangs[2:4]) and not cast.gangs[-1].dead
        assert "learner is lost again on its way: load: died" in cast.told[2]

    asyncio.run(run())


def test_a_call_that_kills_every_gang_ends_the_run(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, *["train 3"] * 3, max_attempts=3)
        with pytest.raises(RoleLostError, match="rank 1, train 3: died; it failed at the same call each time") as ended:
            await cast.run()
        assert [incident.outcome for incident in ended.value.incidents] == ["replaced", "replaced", "given up"]
        assert len(cast.gangs) == 3
        with pytest.raises(RoleLostError) as again:
            await cast.learner.export_again()
        assert again.value is ended.value and len(cast.gangs) == 3, "for good: whoever asks later has no gang started"

    asyncio.run(run())


def test_a_gang_that_keeps_dying_ends_the_run_with_the_limit(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, "train 1", "export 3", max_restarts=1)
        with pytest.raises(RoleLostError, match=r"given up \(supervision.max_restarts: 1 in 600 s\)"):
            await cast.run()

    asyncio.run(run())


def test_other_weights_than_the_journal_s_end_the_run(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, "train 3")
        cast.damaged = True
        with pytest.raises(RoleLostError, match="1 steps repeated from the checkpoint of step 2 gave weights of versi"):
            await cast.run()
        assert all(gang.dead for gang in cast.gangs)

    asyncio.run(run())


def test_without_records_the_run_goes_on_only_from_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    async def run() -> None:
        undisturbed = await Cast(tmp_path).run()
        assert await Cast(tmp_path, "train 2", record_steps=False).run() == undisturbed
        with pytest.raises(RoleLostError, match="is false, so that 1 steps after the checkpoint of step 2"):
            await Cast(tmp_path, "train 3", record_steps=False).run()

    asyncio.run(run())


@pytest.mark.parametrize("unanswered", [3, 1000])
def test_a_store_that_does_not_answer_is_waited_for_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unanswered: int
) -> None:
    monkeypatch.setattr("actors.learner_supervisor.STORE_POLL_S", 0.01)
    cast = Cast(tmp_path, "train 5", vacancy_timeout_s=0.2)
    cast.unanswered = unanswered
    if unanswered == 3:
        assert len(asyncio.run(cast.run())) == 6
        assert cast.gangs[1].calls[:2] == ["start", "load"]
        assert [line for line in cast.told if "cannot be read: ClientError: 503 Slow Down; tried for 0.2 s" in line]
    else:
        words = (
            r"the checkpoints could not be read for 0\.2 s \(supervision\.vacancy_timeout_s\): ClientError: 503 Slow"
        )
        with pytest.raises(RoleLostError, match=words):
            asyncio.run(cast.run())
        assert cast.gangs[1].dead and cast.incidents.over[0].outcome == "given up"


def test_a_store_that_hangs_ends_the_run_and_not_only_its_wait(tmp_path: Path) -> None:
    cast = Cast(tmp_path, "train 5")
    cast.config.grpo.checkpoint_timeout_s = 0.3
    cast.hangs.clear()
    began = time.monotonic()
    words = r"waited 0\.3 s \(grpo\.checkpoint_timeout_s\) for the newest checkpoint to be read"
    with pytest.raises(RoleLostError, match=words):
        asyncio.run(cast.run())
    cast.hangs.set()
    assert time.monotonic() - began < 10, "the event loop does not wait for the thread that hangs"
    assert cast.gangs[1].dead and cast.incidents.over[0].outcome == "given up"


def test_steps_before_a_resume_are_repeated_by_what_the_journal_says(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path)
        notes = {0: StepNote(changed=True), 1: StepNote(changed=False), 2: StepNote(changed=True, checksum=None)}
        cast.records = {0, 2}
        gang: Any = cast.gangs[0]
        gang.seen = [0, 2]
        learner: Any = LearnerSupervisor(cast.config, cast._start, gang, cast, notes, cast.incidents, version=3)
        cast.fail_at = ["train 3"]
        await learner.train_step([1], 1e-3, 3)
        assert cast.gangs[1].seen == [0, 2, 3]

    asyncio.run(run())


@pytest.mark.parametrize("kept", [True, False])
def test_a_journal_that_was_lost_is_no_way_to_other_weights(tmp_path: Path, kept: bool) -> None:
    """The run goes on from version 3; of the steps before it nothing is known, but for its checkpoint."""

    async def run() -> None:
        cast = Cast(tmp_path, max_restarts=1)
        cast.checkpoints = {3: [0, 2]} if kept else {2: [0]}
        gang: Any = cast.gangs[0]
        learner: Any = LearnerSupervisor(cast.config, cast._start, gang, cast, {}, cast.incidents, version=3)
        cast.fail_at = ["train 3"]
        if kept:
            await learner.train_step([1], 1e-3, 3)
            assert cast.gangs[1].seen == [0, 2, 3]
        else:
            with pytest.raises(RoleLostError, match="the journal does not say what became of step 2"):
                await learner.train_step([1], 1e-3, 3)

    asyncio.run(run())


class DeadSpares:
    """One, which went with its node."""

    ready = True

    def take(self) -> None:
        self.ready = False

    def order(self, index: int, beside: Any) -> None: ...


def test_a_gang_whose_spares_went_with_their_node_costs_one_restart(tmp_path: Path) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, "train 1", "start", max_restarts=1)
        spares = cast.learner._spares = DeadSpares()
        start = cast.learner._start

        async def taking_them() -> Any:
            spares.take()
            return await start()

        cast.learner._start = taking_them
        assert len(await cast.run()) == 6 and len(cast.gangs) == 3

    asyncio.run(run())


@pytest.mark.parametrize("dies", [True, False])
def test_an_export_for_those_who_miss_the_last_one_waits_for_the_step_under_way(tmp_path: Path, dies: bool) -> None:
    async def run() -> None:
        cast = Cast(tmp_path, *["export 2"] * dies)
        await cast.learner.train_step([1], 1e-3, 0)
        await cast.learner.export(1)
        step = asyncio.create_task(cast.learner.train_step([1], 1e-3, 1))
        await asyncio.sleep(0)
        weights, version, checksum = await cast.learner.export_again()
        assert step.done() and (weights, version, checksum) == ("weights of [0, 1]", 2, hash((0, 1)))
        assert len(cast.gangs) == 1 + dies

    asyncio.run(run())


class FakeBundles:
    """The learners' node comes back after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def has_node(self, role: str, index: int) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wanting(self, role: str, index: int) -> str:
        return "learner 0: 1 CPU. The cluster has nothing"

    def is_gone(self, node_id: str) -> bool:
        raise AssertionError("no group is asked of learners")


@pytest.mark.parametrize("returns", [True, False])
def test_a_gang_waits_for_a_node_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    monkeypatch.setattr("actors.starting.PLACE_POLL_S", 0.01)

    async def run() -> None:
        cast = Cast(tmp_path, "train 1", max_restarts=1, vacancy_timeout_s=0.2)
        cast.learner._places.bundles = FakeBundles(3 if returns else 10**9)
        if returns:
            assert len(await cast.run()) == 6
        else:
            with pytest.raises(RoleLostError, match=r"no node had room for it in 0.2 s \(supervision.vacancy"):
                await cast.run()
            assert len(cast.gangs) == 1
        assert "no node has room for learner 0: 1 CPU. The cluster has nothing; the run waits 0.2 s" in cast.told[1]

    asyncio.run(run())
