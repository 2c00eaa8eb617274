"""The learner gang as the loop knows it, started again in place when it fails.

    call --- a rank died, fell silent, failed ---> all ranks are killed
      ^                                              | at most supervision.max_restarts times
      |                                              v within supervision.restart_window_s
      +--- the call is repeated --- weights compared --- recorded steps repeated --- checkpoint --- new gang in the
                                                                                     same bundles, from spares

Because a recorded step gives the same weights bit for bit, the run goes on as if nothing had happened; the generators
have worked on meanwhile.

Owns: which steps the weights have seen, the way back to them. Does not own: the gang (learner_gang.py), checkpoints and
the journal (pipelines/).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from actors.deadline import DeadlineError, within
from actors.failure import log_tail
from actors.learner_gang import GroupWithAdvantages, LearnerError, LearnerGang
from actors.member import Bundles, Loss
from actors.own_thread import in_own_thread
from actors.spares import Spares
from actors.starting import NoPlaceError, Places
from actors.supervision import Incidents, Restarts
from actors.weight_transfer import BroadcastWeights
from medtvt_rl.config import Config
from medtvt_rl.faults import Incident, Outcome, RoleLostError
from medtvt_rl.storage import Digest
from medtvt_rl.types import LearnerStep

T = TypeVar("T")
ROLE = "learner"
STORE_POLL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNote:
    """A step that the weights have seen.

    Attributes:
        changed: whether it changed them; there is a record of it then.
        checksum: of the weights after it, None where they were not exported.
    """

    changed: bool
    checksum: int | None = None


class Shelf(Protocol):
    """The checkpoints of this run."""

    def newest(self, version: int) -> tuple[str, int] | None:
        """Place of the learners' part, and version, of the newest whole one not later than `version`; None is
        the model that the run started from. May take long, or for ever.

        Raises:
            OutOfReachError: that cannot be said now.
        """


class OutOfReachError(RuntimeError):
    """The store of the checkpoints does not answer, or not as it should; it may later. The message says how."""


class RecoveryError(RuntimeError):
    """The weights cannot be had back; the message says why, and the mend."""


class LearnerSupervisor:
    """Has the methods of LearnerGang; each raises RoleLostError where the gang is lost for good.

    Args:
        start: a new gang with the weights that the run started from.
        gang: the first one.
        shelf: where a new gang begins.
        steps: what the weights of `gang` have seen already, by step: those before a resume, as far as they are known.
        version: of the weights of `gang`.
        spares: beside every rank one is kept. A gang with some that fails costs no restart: they go with their nodes.
        bundles: asked before a gang is started; None where every bundle has its node.
    """

    def __init__(
        self,
        config: Config,
        start: Callable[[], Awaitable[LearnerGang]],
        gang: LearnerGang,
        shelf: Shelf,
        steps: Mapping[int, StepNote],
        incidents: Incidents,
        spares: Spares | None = None,
        bundles: Bundles | None = None,
        version: int = 0,
    ) -> None:
        self._config, self._start, self._gang, self._shelf = config, start, gang, shelf
        self._steps, self._incidents, self._spares = dict(steps), incidents, spares
        self._places, self._version = Places(ROLE, bundles, incidents.report), version
        self._restarts = Restarts(config.supervision)
        self._asking = asyncio.Lock()
        self._lost_for_good: RoleLostError | None = None
        self._order_spares()

    # What the loop asks.

    async def train_step(
        self, groups: Sequence[GroupWithAdvantages], learning_rate: float, version: int
    ) -> LearnerStep:
        """See LearnerGang."""
        step = await self._call(lambda gang: gang.train_step(groups, learning_rate, version), groups=len(groups))
        self._steps[version] = StepNote(changed=step.metrics.get("updates", 0.0) > 0)
        self._version = version + 1
        return step

    async def export(self, version: int) -> tuple[ray.ObjectRef | BroadcastWeights, int]:
        """See LearnerGang."""
        weights, checksum = await self._call(lambda gang: gang.export(version))
        if version - 1 in self._steps:
            self._steps[version - 1] = replace(self._steps[version - 1], checksum=checksum)
        return weights, checksum

    async def export_again(self) -> tuple[ray.ObjectRef, int, int]:
        """The whole buffer of the weights of now, their version and checksum, for those who miss the last ones."""

        async def work(gang: LearnerGang) -> tuple[ray.ObjectRef, int, int]:
            version = self._version
            weights, checksum = await gang.export(version)
            return weights.buffer if isinstance(weights, BroadcastWeights) else weights, version, checksum

        return await self._call(work)

    async def score(self, group: ray.ObjectRef, index: int) -> NDArray[np.float32]:
        """See LearnerGang."""
        return await self._call(lambda gang: gang.score(group, index))

    async def save_model(self, folder: Path) -> None:
        """See LearnerGang."""
        await self._call(lambda gang: gang.save_model(folder))

    async def snapshot(self) -> bool:
        """See LearnerGang."""
        return await self._call(lambda gang: gang.snapshot())

    async def write_snapshot(self, folder: str) -> dict[str, Digest]:
        """See LearnerGang; not made again where it fails, for what was kept is gone with the gang."""
        return await self._gang.write_snapshot(folder)

    def stop(self) -> None:
        """Ends every rank and every spare."""
        self._gang.stop()
        if self._spares is not None:
            self._spares.stop()

    # What becomes of a failure.

    async def _call(self, work: Callable[[LearnerGang], Awaitable[T]], groups: int = 0) -> T:
        """What a call on the gang gives, made again on a new one where it fails, `supervision.max_attempts` at most: it
        may be the call that kills it. Whoever calls after it was given up learns of the same loss."""
        attempts = self._config.supervision.max_attempts
        # One call at a time: a step under way would have the next one wait, within its deadline.
        async with self._asking:
            if self._lost_for_good is not None:
                raise self._lost_for_good
            for attempt in range(1, attempts + 1):
                try:
                    return await work(self._gang)
                except LearnerError as error:
                    await self._mend(error, groups, last=attempt == attempts)
        raise AssertionError("the last attempt returns or raises")

    async def _mend(self, error: LearnerError, groups: int, last: bool) -> None:
        """A new gang in place of the failed one. Raises RoleLostError where it must not be, or cannot be."""
        began = time.monotonic()
        self._incidents.report(f"learner is lost: {error.cause}; {self._fate(last)}")
        loss = Loss(
            cause=error.cause, node=error.node, groups=groups, log_tail=log_tail(self._log(error.rank)), at=began
        )
        first = error
        reason = "it failed at the same call each time"
        while not last:
            if not self._restarts.allowed:
                reason = f"given up ({self._restarts.limit})"
                break
            try:
                await self._placed()
                self._restarts.begin()
                by_spares = self._spares is not None and self._spares.ready
                words = await self._brought_back()
            except LearnerError as again:
                error = again
                if by_spares or not await self._places.has_node(0):
                    self._restarts.take_back()
                self._incidents.report(f"learner is lost again on its way: {error.cause}; {self._fate(last)}")
            except RecoveryError as final:
                reason = str(final)
                break
            else:
                self._close(first, loss, "replaced")
                self._incidents.report(f"learner goes on after {time.monotonic() - began:.1f} s, {words}")
                self._order_spares()
                return
        if error is not first:
            loss = replace(loss, cause=f"{loss.cause}; then, on its way back, {error.cause}")
        self._close(first, loss, "given up")
        words = f"the learner is lost: rank {first.rank}, {loss.cause}; {reason}"
        self._lost_for_good = RoleLostError(words, self._incidents.of(ROLE))
        raise self._lost_for_good from error

    async def _placed(self) -> None:
        """Returns when every rank has a node: at once, or when one has room. Raises RecoveryError if none has in
        time."""
        limit_s, setting = self._config.supervision.vacancy_timeout_s, "supervision.vacancy_timeout_s"
        try:
            await self._places.wait(0, f"the run waits {limit_s:g} s for one ({setting})", limit_s)
        except NoPlaceError as error:
            raise RecoveryError(f"no node had room for it in {limit_s:g} s ({setting}); {error}") from error

    def _fate(self, last: bool) -> str:
        if last:
            return "given up, for it failed at the same call each time"
        return "it is started again" if self._restarts.allowed else f"given up ({self._restarts.limit})"

    async def _brought_back(self) -> str:
        """A new gang with the weights of now; in words, how it got there."""
        version = self._version
        gang, found = await asyncio.gather(self._start(), self._newest(version), return_exceptions=True)
        for each in (gang, found):
            if isinstance(each, BaseException):
                if not isinstance(gang, BaseException):
                    gang.stop()
                raise each
        try:
            words = await self._caught_up(gang, found, version)  # type: ignore[arg-type]
        except BaseException:
            gang.stop()  # type: ignore[union-attr]
            raise
        self._gang = gang  # type: ignore[assignment]
        return words

    async def _newest(self, version: int) -> tuple[str, int] | None:
        """The checkpoint to begin at. Raises RecoveryError where the store does not answer in time, or at all."""
        read_s, read_setting = self._config.grpo.checkpoint_timeout_s, "grpo.checkpoint_timeout_s"
        limit_s, setting = self._config.supervision.vacancy_timeout_s, "supervision.vacancy_timeout_s"
        deadline, told = time.monotonic() + limit_s, False
        while True:
            try:
                reading = in_own_thread(self._shelf.newest, version)
                return await within(reading, read_s, "the newest checkpoint to be read", read_setting)
            except DeadlineError as error:
                raise RecoveryError(str(error)) from error
            except OutOfReachError as error:
                if time.monotonic() > deadline:
                    raise RecoveryError(
                        f"the checkpoints could not be read for {limit_s:g} s ({setting}): {error}"
                    ) from error
                if not told:
                    self._incidents.report(
                        f"the checkpoints cannot be read: {error}; tried for {limit_s:g} s ({setting})"
                    )
                told = True
            await asyncio.sleep(STORE_POLL_S)

    async def _caught_up(self, gang: LearnerGang, found: tuple[str, int] | None, version: int) -> str:
        first = 0
        if found is not None:
            folder, first = found
            await gang.load_checkpoint(folder)
        missed = [step for step in sorted(self._steps) if step >= first and self._steps[step].changed]
        if missed and not self._config.grpo.record_steps:
            raise RecoveryError(
                f"grpo.record_steps is false, so that {len(missed)} steps after {_name(first)} cannot be repeated; the "
                "same command goes on from there"
            )
        if unknown := [step for step in range(first, version) if step not in self._steps]:
            raise RecoveryError(
                f"the journal does not say what became of step {unknown[0]}, so that the way from {_name(first)} to "
                f"version {version} is not known; the same command goes on from a checkpoint"
            )
        for step in missed:
            await gang.replay_step(step)
        expected = self._steps[version - 1].checksum if version - 1 in self._steps else None
        if expected is not None:
            _, checksum = await gang.export(version)
            if checksum != expected:
                raise RecoveryError(
                    f"{len(missed)} steps repeated from {_name(first)} gave weights of version {version} with checksum "
                    f"{checksum:#010x}, and not {expected:#010x}; the same command goes on from a checkpoint"
                )
        return f"from {_name(first)} with {len(missed)} steps repeated" + (
            ", to the same weights" if expected is not None else ""
        )

    def _log(self, rank: int) -> Path:
        return self._config.folder / "logs" / f"{ROLE}_{rank}.log"

    def _close(self, error: LearnerError, loss: Loss, outcome: Outcome) -> None:
        incident = Incident(
            role=ROLE,
            index=error.rank,
            node=loss.node,
            cause=loss.cause,
            log=str(self._log(error.rank)),
            log_tail=loss.log_tail,
            outcome=outcome,
            seconds=time.monotonic() - loss.at,
            groups=loss.groups,
        )
        self._incidents.add(incident)

    def _order_spares(self) -> None:
        if self._spares is not None:
            for rank, where in enumerate(self._gang.where):
                self._spares.order(rank, where)


def _name(version: int) -> str:
    return f"the checkpoint of step {version}" if version else "the model that the run started from"
