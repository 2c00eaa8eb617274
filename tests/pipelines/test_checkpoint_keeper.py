"""The keeper: training waits for the copy alone, one checkpoint is written at a time, a failure costs nothing else."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from stored_examples import a_config, fetch, finished_group

from medtvt_rl.config import Config
from medtvt_rl.storage import Digest, Storage
from pipelines.checkpoint_keeper import CheckpointKeeper
from pipelines.checkpoints import CheckpointStore


class SlowLearners:
    """Writing waits until it is allowed; notes what happens, in order."""

    def __init__(self, copies: bool = True) -> None:
        self.copies, self.may_write = copies, asyncio.Event()
        self.events: list[str] = []
        self.error: Exception | None = None

    async def snapshot(self) -> bool:
        self.events.append("copied")
        return self.copies

    async def write_snapshot(self, folder: str) -> dict[str, Digest]:
        await self.may_write.wait()
        if self.error is not None:
            Storage(folder).write("rank_00000.safetensors", b"ha")
            raise self.error
        self.events.append("written")
        Storage(folder).write("rank_00000.safetensors", b"state")
        return {"rank_00000.safetensors": Storage(folder).digest("rank_00000.safetensors")}


def keeper_at(root: Path, learners: SlowLearners, said: list[str]) -> CheckpointKeeper:
    config = a_config(root, "grpo.held_out.every_steps=4", "grpo.keep_checkpoints=1")
    return CheckpointKeeper(config, CheckpointStore.of(config), learners, {}, said.append, fetch)


def test_training_waits_for_the_copy_and_the_next_checkpoint_for_this_one(tmp_path: Path) -> None:
    async def run() -> None:
        learners, said = SlowLearners(), list[str]()
        keeper = keeper_at(tmp_path, learners, said)
        await asyncio.wait_for(keeper.save(1, {}, [finished_group(3)]), 5)
        assert learners.events == ["copied"] and keeper.newest is None
        second = asyncio.create_task(keeper.save(2, {}, []))
        await asyncio.sleep(0.05)
        assert not second.done() and learners.events == ["copied"]
        learners.may_write.set()
        await asyncio.wait_for(second, 5)
        assert learners.events[:3] == ["copied", "written", "copied"] and keeper.newest == 1
        await keeper.close()
        assert keeper.newest == 2 and not said

    asyncio.run(run())


def test_one_appears_when_its_step_was_told_and_training_does_not_wait_for_that(tmp_path: Path) -> None:
    async def run() -> None:
        learners, told = SlowLearners(), asyncio.get_running_loop().create_future()
        keeper = keeper_at(tmp_path, learners, [])
        learners.may_write.set()
        await asyncio.wait_for(keeper.save(1, {}, [], told), 5)
        while "written" not in learners.events:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert keeper.newest is None and CheckpointStore.of(a_config(tmp_path)).versions() == []
        told.set_result(None)
        await keeper.close()
        assert keeper.newest == 1 and CheckpointStore.of(a_config(tmp_path)).versions() == [1]

    asyncio.run(run())


@pytest.mark.parametrize("raises", [False, True])
def test_none_appears_of_a_step_that_was_not_told(tmp_path: Path, raises: bool) -> None:
    async def run() -> None:
        learners, said, told = SlowLearners(), list[str](), asyncio.get_running_loop().create_future()
        keeper = keeper_at(tmp_path, learners, said)
        learners.may_write.set()
        await keeper.save(1, {}, [], told)
        told.set_exception(OSError("No space left on device")) if raises else told.cancel()
        await keeper.close()
        reason = "its step did not reach the journal"
        assert said == [f"the checkpoint of step 1 could not be written ({reason}); there is none yet"]
        assert keeper.newest is None and CheckpointStore.of(a_config(tmp_path)).versions() == []

    asyncio.run(run())


def test_where_memory_is_scarce_training_waits_for_all_of_it(tmp_path: Path) -> None:
    async def run() -> None:
        learners = SlowLearners(copies=False)
        keeper = keeper_at(tmp_path, learners, [])
        saving = asyncio.create_task(keeper.save(1, {}, []))
        await asyncio.sleep(0.05)
        assert not saving.done()
        learners.may_write.set()
        await asyncio.wait_for(saving, 5)
        assert keeper.newest == 1

    asyncio.run(run())


@pytest.mark.parametrize("late", [False, True])
def test_one_that_cannot_be_written_is_told_and_the_one_before_stays(tmp_path: Path, late: bool) -> None:
    async def run() -> None:
        learners, said = SlowLearners(), list[str]()
        keeper = keeper_at(tmp_path, learners, said)
        learners.may_write.set()
        await keeper.save(1, {}, [])
        await keeper.settle()
        if late:
            learners.may_write.clear()
            keeper._config.grpo.checkpoint_timeout_s = 0.2
        learners.error = OSError("No space left on device")
        await keeper.save(2, {}, [])
        await keeper.close()
        why = r"not done in 0.2 s (grpo.checkpoint_timeout_s)" if late else "No space left on device"
        assert said == [f"the checkpoint of step 2 could not be written ({why}); the newest is that of step 1"]
        assert keeper.newest == 1
        found = CheckpointStore.of(a_config(tmp_path)).newest(said.append)
        assert found is not None and found.version == 1 and len(said) == 1

    asyncio.run(run())


def test_one_that_is_late_in_its_thread_ends_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        learners, said, may_end = SlowLearners(), list[str](), threading.Event()
        keeper = keeper_at(tmp_path, learners, said)
        keeper._config.grpo.checkpoint_timeout_s = 1.0
        learners.may_write.set()
        complete = CheckpointStore.complete

        def late(store: CheckpointStore, config: Config, version: int, *args: Any) -> None:
            assert version != 1 or may_end.wait(10)
            complete(store, config, version, *args)

        monkeypatch.setattr(CheckpointStore, "complete", late)
        await keeper.save(1, {}, [])
        await keeper.settle()
        assert said.pop().startswith("the checkpoint of step 1 could not be written (not done in 1 s")
        await keeper.save(2, {}, [])
        await keeper.settle()
        assert said.pop().startswith("the checkpoint of step 2 could not be written (not done in 1 s")
        assert learners.events.count("written") == 1, "the second was not begun"
        keeper._config.grpo.checkpoint_timeout_s = 30.0
        may_end.set()
        await keeper.save(3, {}, [])
        await keeper.close()
        store = CheckpointStore.of(a_config(tmp_path))
        assert keeper.newest == 3 and store.versions() == [3] and store.newest(said.append) and not said

    asyncio.run(run())


@pytest.mark.parametrize("late", [False, True])
def test_one_that_is_being_written_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """As a stop asks, right after a step whose checkpoint was due."""

    async def run() -> None:
        learners, said, begun, may_end = SlowLearners(), list[str](), list[int](), threading.Event()
        keeper = keeper_at(tmp_path, learners, said)
        begin, complete = CheckpointStore.begin, CheckpointStore.complete

        def noted(store: CheckpointStore, version: int) -> str:
            begun.append(version)
            return begin(store, version)

        def slow(*args: Any) -> None:
            assert not late or may_end.wait(10)
            complete(*args)

        monkeypatch.setattr(CheckpointStore, "begin", noted)
        monkeypatch.setattr(CheckpointStore, "complete", slow)
        if late:
            learners.may_write.set()
            keeper._config.grpo.checkpoint_timeout_s = 2.0
        await keeper.save(1, {}, [])
        if late:
            await keeper.settle()
            assert said.pop().startswith("the checkpoint of step 1 could not be written (not done in 2 s")
            keeper._config.grpo.checkpoint_timeout_s = 30.0
        last = asyncio.create_task(keeper.save(1, {}, []))
        await asyncio.sleep(0.05)
        learners.may_write.set()
        may_end.set()
        await last
        await keeper.close()
        assert begun == [1] and keeper.newest == 1 and CheckpointStore.of(a_config(tmp_path)).versions() == [1]
        assert learners.events.count("written") == 1 and not said

    asyncio.run(run())


def test_one_that_is_whole_is_told_as_such_where_older_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        learners, said = SlowLearners(), list[str]()
        keeper = keeper_at(tmp_path, learners, said)
        learners.may_write.set()

        def rotate(*_: object) -> None:
            raise OSError("Stale file handle")

        monkeypatch.setattr(CheckpointStore, "rotate", rotate)
        await keeper.save(1, {}, [])
        await keeper.settle()
        what = "scores could not be noted beside checkpoints, or old ones removed"
        assert said == [f"{what} (Stale file handle); the next does it"] and keeper.newest == 1
        monkeypatch.undo()
        mark = CheckpointStore.mark
        monkeypatch.setattr(CheckpointStore, "mark", rotate)
        keeper.scored({"held_out/version": 1.0, "held_out/jaccard": 0.5})
        await keeper.close()
        assert len(said) == 2
        monkeypatch.setattr(CheckpointStore, "mark", mark)
        await keeper.close()
        assert len(said) == 2 and CheckpointStore.of(a_config(tmp_path)).best() == (1, 0.5)

    asyncio.run(run())


def test_the_newest_the_best_and_the_one_that_waits_for_its_score_are_kept(tmp_path: Path) -> None:
    async def run() -> None:
        learners, said = SlowLearners(), list[str]()
        learners.may_write.set()
        keeper = keeper_at(tmp_path, learners, said)
        store = CheckpointStore.of(a_config(tmp_path))
        for version in range(1, 12):
            if version == 4:
                keeper.measuring = 4
            await keeper.save(version, {}, [])
            if version == 10:  # that of 8 was not begun meanwhile
                keeper.scored({"held_out/version": 4.0, "held_out/jaccard": 0.6})
                keeper.measuring = None
            await keeper.settle()
            if 5 <= version <= 9:
                assert store.versions() == [version, 4], "4 is not yet measured, 8 never"
        await keeper.close()
        assert store.versions() == [11, 4] and store.best() == (4, pytest.approx(0.6))
        keeper.scored({"held_out/version": 12.0, "held_out/reward": 0.5})
        keeper.scored({"held_out/version": 16.0, "held_out/reward": 0.5})
        assert said == ["grpo.held_out.best_by is 'jaccard', measured are reward, version: no best checkpoint is kept"]

    asyncio.run(run())
