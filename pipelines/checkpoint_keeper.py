"""Writes checkpoints beside training: the learners copy their state, training goes on, the rest happens behind it.

    save: wait for the one before -> learners copy (training waits until here) -> write, check
          -> its step is told -> let appear, rotate

Owns: the order of these, the one checkpoint being written, the scores of held-out answers by version. Does not own: the
files (checkpoints.py), what is in them, or when one is due (grpo_loop.py). One that cannot be written is told, and
costs the run nothing else: the one before stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.own_thread import in_own_thread
from medtvt_rl.config import Config
from medtvt_rl.storage import Digest
from pipelines.checkpoints import LEARNER, CheckpointStore
from pipelines.grpo_roles import FinishedGroup


class Snapshots(Protocol):
    """The learner gang."""

    async def snapshot(self) -> bool:
        """Keeps the present state; False where nothing may train before `write_snapshot` is done."""

    async def write_snapshot(self, folder: str) -> dict[str, Digest]:
        """Writes what was kept; checksums by file."""


class CheckpointKeeper:
    """The Checkpoints of the loop.

    Args:
        identity: see identity.py.
        report: told in one line what went wrong.
        fetch: from a handle of the loop to what is behind it.
        newest: version of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        learners: Snapshots,
        identity: Mapping[str, str],
        report: Callable[[str], None],
        fetch: Callable[[Any], Any],
        newest: int | None = None,
    ) -> None:
        self._config, self._store, self._learners = config, store, learners
        self._identity, self._report, self._fetch = identity, report, fetch
        self._task: asyncio.Task[None] | None = None
        self._thread: asyncio.Future[Any] | None = None
        self._scores: dict[int, float] = {}
        self._knows_metric = True
        self.newest = newest
        self.measuring: int | None = None

    async def save(
        self,
        version: int,
        state: dict[str, Any],
        groups: Sequence[FinishedGroup],
        told: asyncio.Future[None] | None = None,
    ) -> None:
        """Returns when training may go on; at once where there is one of this version."""
        await self.settle()
        if self.newest == version:
            return
        in_background = await self._learners.snapshot()
        self._task = asyncio.create_task(self._write(version, state, groups, told), name=f"checkpoint {version}")
        if not in_background:
            await self.settle()

    async def settle(self) -> None:
        """Returns when no checkpoint is being written."""
        if self._task is not None:
            task, self._task = self._task, None
            try:
                await task
            finally:
                task.cancel()

    def scored(self, metrics: Mapping[str, float]) -> None:
        """Takes the score of a measurement on held-out answers."""
        name = f"held_out/{self._config.best_by}"
        if name in metrics:
            self._scores[int(metrics["held_out/version"])] = metrics[name]
        elif metrics and self._knows_metric:
            self._knows_metric = False
            known = ", ".join(sorted(key.removeprefix("held_out/") for key in metrics))
            best_by = self._config.best_by
            self._report(f"grpo.held_out.best_by is {best_by!r}, measured are {known}: no best checkpoint is kept")

    async def _write(
        self,
        version: int,
        state: dict[str, Any],
        groups: Sequence[FinishedGroup],
        told: asyncio.Future[None] | None,
    ) -> None:
        timeout_s, deadline = self._timeout()
        try:
            async with asyncio.timeout_at(deadline):
                await self._idle()
                if self.newest == version:
                    return  # the one before was of this version too, and late
                place = await self._in_thread(self._store.begin, version)
                files = await self._learners.write_snapshot(f"{place}/{LEARNER}")
                if told is not None:
                    await _has_told(told)
                await self._in_thread(self._complete, version, state, groups, files)
        except Exception as error:  # the disk, a learner, or the store behind a URL, whose client has errors of its own
            kept = "there is none yet" if self.newest is None else f"the newest is that of step {self.newest}"
            late = f"not done in {timeout_s:g} s (grpo.checkpoint_timeout_s)"
            reason = " ".join(str(error).split()) or late
            self._report(f"the checkpoint of step {version} could not be written ({reason}); {kept}")
            return
        await self._tidied(deadline)

    def _complete(
        self, version: int, state: dict[str, Any], groups: Sequence[FinishedGroup], files: Mapping[str, Digest]
    ) -> None:
        self._store.complete(self._config, version, state, groups, files, self._identity, self._fetch)
        self.newest = version

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """One at a time, also where the one before is late and nobody waits for it any more."""
        await self._idle()
        self._thread = asyncio.ensure_future(in_own_thread(work, *args))
        self._thread.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may have no reader
        return await asyncio.shield(self._thread)

    async def _idle(self) -> None:
        if self._thread is not None:
            await asyncio.wait([self._thread])

    def _timeout(self) -> tuple[float, float]:
        """Seconds, and when they are over by the loop's clock."""
        timeout_s = self._config.grpo.checkpoint_timeout_s
        return timeout_s, asyncio.get_running_loop().time() + timeout_s

    async def _tidied(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._in_thread(self.tidy)
        except Exception as error:
            reason = " ".join(str(error).split()) or "grpo.checkpoint_timeout_s is over"
            self._report(
                f"scores could not be noted beside checkpoints, or old ones removed ({reason}); the next does it"
            )

    async def close(self) -> None:
        """Returns when all is written and tidy: the run is at its end."""
        await self.settle()
        await self._tidied(self._timeout()[1])

    def tidy(self) -> None:
        """Notes scores beside their checkpoints, and removes those that need not be kept."""
        measuring = self.measuring  # asked before the scores: one that comes meanwhile is noted the next time
        for version in sorted(self._scores.keys() & {*self._store.versions()}):
            self._store.mark(version, self._config.best_by, self._scores[version])
            del self._scores[version]
        self._store.rotate(self._config.grpo.keep_checkpoints, [] if measuring is None else [measuring])


async def _has_told(told: asyncio.Future[None]) -> None:
    """Returns when a step was told. Raises RuntimeError if it was not: the journal of who goes on would lack it."""
    await asyncio.wait([told])  # and not the future itself, which a checkpoint that is late would cancel
    if told.cancelled() or told.exception() is not None:
        raise RuntimeError("its step did not reach the journal")
