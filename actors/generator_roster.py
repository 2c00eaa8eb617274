"""Which rollout generators serve, and the successor of one that is lost.

    serving --- died, broke, fell silent, holds wrong weights ---> killed
       ^                                                             | at most rollout.max_restarts times
       |                                                             v within rollout.restart_window_s
       +--- newest weights loaded, none newer by now --- started in its own bundle; else given up

Owns: the generators by index, the weights published last, losses and successors. Does not own: groups and what is asked
of a generator (rollout_pool.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.deadline import DeadlineError, within
from actors.failure import ActorError, cause_of, with_log
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.weights import WeightBufferError


class WeightSyncError(RuntimeError):
    """An engine holds other weights than it was sent."""


class GeneratorLostError(ActorError):
    """A generator is gone: its actor died, its engine broke, it fell silent, or it holds wrong weights."""


# What a successor may fail with on its way; anything else is a fault of this program.
START_FAULTS = (RayError, DeadlineError, EngineBrokenError, WeightBufferError, WeightSyncError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Weights that every engine is to hold: a reference, their version, their checksum."""

    weights: Any
    version: int
    checksum: int

    def check(self, index: int, found: int) -> None:
        """Raises WeightSyncError where generator `index` reports another checksum."""
        if found != self.checksum:
            raise WeightSyncError(
                f"rollout {index} holds checksum {found} of version {self.version}, sent {self.checksum}"
            )


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """A generator that serves; its successor is another member of the same index.

    Attributes:
        load: completions under way.
        answered_at: when it last answered anything, on the monotonic clock.
    """

    index: int
    handle: Any
    load: int = 0
    answered_at: float = field(default_factory=time.monotonic)


class GeneratorRoster:
    """The generators of a run.

    Args:
        handles: started generators; the place of each is its index.
        report: told in one line when a generator is lost, serves again, or is given up.
        renew: makes a new actor for an index; None where none is ever replaced.
        kill: ends the process behind a handle.
        timeline: where every call is recorded.

    Attributes:
        serving: by index.
        publication: what a successor loads before it serves. Set it before any engine is asked to load it: a successor
            that comes up meanwhile then ends with it, too.
    """

    def __init__(
        self,
        config: Config,
        handles: list[Any],
        report: Callable[[str], None],
        renew: Callable[[int], Any] | None = None,
        kill: Callable[[Any], None] = ray.kill,
        timeline: Timeline | None = None,
    ) -> None:
        self._config, self._timeline = config.rollout, timeline or Timeline()
        self._logs = config.folder / "logs"
        self._report, self._renew, self._kill = report, renew, kill
        self.serving = {index: Member(index=index, handle=handle) for index, handle in enumerate(handles)}
        self.publication: Publication | None = None
        self._losses: dict[int, GeneratorLostError] = {}
        self._restarts: dict[int, list[float]] = {index: [] for index in self.serving}
        self._successors: dict[int, asyncio.Task[None]] = {}
        self._starting: dict[int, Any] = {}

    async def least_loaded(self, purpose: str) -> Member:
        """The member with the fewest completions under way. Waits and raises as `wait_for_one` does."""
        await self.wait_for_one(purpose)
        return self.by_load()[0]

    def by_load(self) -> list[Member]:
        """The members, those with the fewest completions under way first."""
        return sorted(self.serving.values(), key=lambda member: (member.load, member.index))

    async def wait_for_one(self, purpose: str) -> None:
        """Returns when a generator serves: at once, or when a successor does.

        Raises:
            GeneratorLostError: none serves, and none will.
            DeadlineError: none served in time.
        """
        if not self.serving:
            timeout_s, setting = self._config.generate_timeout_s, "rollout.generate_timeout_s"
            await within(self._successor(), timeout_s, f"a rollout generator to {purpose}", setting)

    async def _successor(self) -> None:
        while not self.serving:
            self.require_one()
            done, _ = await asyncio.wait(self._successors.values(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def require_one(self) -> None:
        """Raises GeneratorLostError where no generator serves and none is on its way, with the cause of each."""
        if not self.serving and not self._successors:
            causes = "\n".join(str(lost) for lost in self._losses.values())
            raise GeneratorLostError(f"no rollout generator is left; {causes}")

    async def ask(self, member: Member, answer: Awaitable[Any], what: str, timeout_s: float, setting: str) -> Any:
        """The answer of a member.

        Raises:
            GeneratorLostError: it is gone, or answered nothing at all in the time given; its successor is on its way.
            DeadlineError: it is late, but answered others meanwhile: it has too much to do.
            ActorError: the call failed.
        """
        who, asked_at = f"rollout {member.index}", time.monotonic()
        try:
            with self._timeline.span(who, what):
                found = await within(answer, timeout_s, f"{who} to {what}", setting)
        except DeadlineError as error:
            if member.answered_at > asked_at:
                raise
            raise self.lose(member, error) from error
        except (RayActorError, EngineBrokenError, WeightBufferError) as error:
            raise self.lose(member, error) from error
        except RayTaskError as error:
            member.answered_at = time.monotonic()
            raise ActorError(f"{who}, asked to {what}: {cause_of(error)}") from error
        member.answered_at = time.monotonic()
        return found

    async def everywhere(
        self, ask: Callable[[Member], Awaitable[Any]], members: Iterable[Member] | None = None
    ) -> list[Any]:
        """What each member, of those that serve now or of those given, answers; a GeneratorLostError from one that was
        lost at it.
        """
        asked = list(self.serving.values() if members is None else members)
        answers = await asyncio.gather(*(ask(member) for member in asked), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, GeneratorLostError):
                raise answer
        return answers

    def lose(self, member: Member, error: Exception) -> GeneratorLostError:
        """Kills a member, once, and sends for its successor; the error to raise."""
        index = member.index
        if self.serving.get(index) is member:
            del self.serving[index]
            self._discard(index, member.handle, error)
            if self._may_restart(index):
                name = f"successor of rollout {index}"
                self._successors[index] = asyncio.create_task(self._succeed(index), name=name)
        return self._losses[index]

    def stop(self) -> None:
        """Ends every generator, those on their way included."""
        for task in self._successors.values():
            task.cancel()
        for handle in [*(member.handle for member in self.serving.values()), *self._starting.values()]:
            self._kill(handle)

    def _discard(self, index: int, handle: Any, error: Exception) -> None:
        """Ends a generator, whatever is left of it, and says why."""
        lost = f"rollout {index} is lost: {cause_of(error)}"
        self._losses[index] = GeneratorLostError(with_log(lost, self._logs / f"rollout_{index}.log"))
        self._kill(handle)
        fate = "it is started again" if self._may_restart(index) else f"given up ({self._limit()})"
        self._report(f"{lost}; {fate}; {len(self.serving)} left")

    def _limit(self) -> str:
        return f"rollout.max_restarts: {self._config.max_restarts} in {self._config.restart_window_s:g} s"

    def _may_restart(self, index: int) -> bool:
        since = time.monotonic() - self._config.restart_window_s
        recent = [started for started in self._restarts[index] if started > since]
        return self._renew is not None and len(recent) < self._config.max_restarts

    async def _succeed(self, index: int) -> None:
        """Starts one successor after the other until one serves or the generator is given up."""
        try:
            while self._renew is not None and self._may_restart(index):
                self._restarts[index].append(time.monotonic())
                handle = self._starting[index] = self._renew(index)
                try:
                    version = await self._bring_up(index, handle)
                except START_FAULTS as error:
                    self._discard(index, handle, error)
                else:
                    self._report(f"rollout {index} serves again, from version {version} on")
                    return
        finally:
            self._starting.pop(index, None)
            self._successors.pop(index, None)

    async def _bring_up(self, index: int, handle: Any) -> int:
        """Makes a member of a new actor once it holds the newest weights, and returns their version."""
        config, who = self._config, f"rollout {index}"
        await within(handle.start.remote(), config.start_timeout_s, f"{who} to start again", "rollout.start_timeout_s")
        held: Publication | None = None
        while (newest := self.publication) is not None and newest is not held:
            what = f"{who} to load weights of version {newest.version}"
            loaded = handle.update_weights.remote(newest.weights, newest.version)
            newest.check(index, await within(loaded, config.update_timeout_s, what, "rollout.update_timeout_s"))
            held = newest
        # Nothing was awaited since the comparison: no publication can have passed this generator by.
        self.serving[index] = Member(index=index, handle=handle)
        return 0 if held is None else held.version
