"""Which actors of a role serve, and the successor of one that is lost.

    serving --- died, fell silent, gives wrong results ---> killed <--- has done what it had --- its node leaves
       ^                                                      | at most supervision.max_restarts times
       |                                                      v within supervision.restart_window_s
       +--- brought up --- started in its own bundle, once that has a node; else given up

Owns: the actors by index, losses and successors, who is asked about a group that failed. Does not own: the records
(member.py), silence (watch.py), what the actors are asked (rollout_pool.py, scoring_pools.py), or where they run
(placement.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from actors.background import in_background
from actors.deadline import DeadlineError, OvertakenError, before, within
from actors.failure import ActorError, ArgumentLostError, cause_of, log_tail, with_log
from actors.member import Bundles, Loss, Member, MemberLeftError, MemberLostError, SickError
from actors.spares import Spares
from actors.starting import Places
from actors.supervision import Incidents, Restarts
from actors.timeline import Timeline
from actors.turns import Turns
from actors.watch import Watch
from medtvt_rl.config import Config
from medtvt_rl.faults import Incident, Outcome, RoleLostError

T = TypeVar("T")
EMPTY_POLL_S = 0.1
DRIVERS_OWN = (ObjectStoreFullError, OutOfDiskError)
"""What keeping an answer on the driver's node may fail with: no fault of who gave it."""
SICK_GROUPS = 2
"""So many groups in a row without finite values, and an actor is held to be sick, whatever others make of them."""
NODES_PER_GROUP = 10
"""So many nodes may go under one group; a group may be what fells a whole machine, too."""


class Roster:
    """The actors of one role.

    Args:
        members: started actors; the place of each is its index.
        incidents: told when one is lost, serves again, or is given up.
        renew: makes a new actor for an index; None where none is ever replaced.
        kill: ends the process behind a handle.
        timeline: where every call is recorded.
        bundles: asked before a successor is started; None where every bundle has its node.
        spares: tried before a new actor is made. One that fails costs no restart: it goes down with its node, too.

    Attributes:
        serving: by index.
        turns: who waits for a member that has nothing to do.
    """

    role = ""
    start_faults: tuple[type[Exception], ...] = (RayError, DeadlineError)
    """What a successor may fail with on its way; anything else is a fault of this program."""
    fatal: tuple[type[Exception], ...] = ()
    """What an actor raises that is of no use any more, besides Ray's own errors."""

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
    ) -> None:
        self._settings, self._supervision = config.rollout, config.supervision
        self._timeline = timeline or Timeline()
        self._logs = config.folder / "logs"
        self._incidents, self._renew, self._kill, self._spares = incidents, renew, kill, spares
        self._places = Places(self.role, bundles, incidents.report)
        self.serving = {member.index: member for member in members}
        self._lost: dict[int, MemberLostError] = {}
        self._open: dict[int, Loss] = {}
        self._restarts = {index: Restarts(config.supervision) for index in self.serving}
        self._successors: dict[int, asyncio.Task[None]] = {}
        self._starting: dict[int, Any] = {}
        self._event = asyncio.Event()
        self.turns = Turns()
        self._watch = Watch(self.role, self._supervision.silence_s, self.serving.values, self.lose)
        self._watching: asyncio.Task[None] | None = None

    # Who serves.

    async def wait_for_one(self, purpose: str) -> None:
        """Returns when an actor serves: at once, or when a successor does.

        Raises:
            RoleLostError: none serves, and none will, or none did in time.
        """
        if not self.serving:
            seconds, setting = self._supervision.vacancy_timeout_s, "supervision.vacancy_timeout_s"
            try:
                await within(self._one(), seconds, f"a {self.role} actor to {purpose}", setting)
            except DeadlineError as error:
                raise RoleLostError(self._none_left(str(error)), self._incidents.of(self.role)) from error

    async def _one(self) -> None:
        while not self.serving:
            self.require_one()
            await self.change()

    async def change(self) -> None:
        """Returns when a member came, went, or has nothing more to do."""
        await self._event.wait()

    def changed(self) -> None:
        """A member came or went: wakes all who wait."""
        event, self._event = self._event, asyncio.Event()
        event.set()
        self.turns.all()

    def freed(self) -> None:
        """A member has nothing more to do: wakes who waits for a change, and whose turn it is."""
        event, self._event = self._event, asyncio.Event()
        event.set()
        self.turns.next()

    def require_one(self) -> None:
        """Raises RoleLostError where no actor serves and none is on its way, with the cause of each."""
        if not self.serving and not self._successors and not self._starting:
            raise RoleLostError(self._none_left(), self._incidents.of(self.role))

    def _none_left(self, *words: str) -> str:
        causes = [str(lost).splitlines()[0] for lost in self._lost.values()]
        return "; ".join([f"no {self.role} actor is left", *words, *causes])

    @property
    def on_their_way(self) -> set[int]:
        """Numbers of those that will serve: successors, and those that start or move. Neither serving nor among these
        is who was given up."""
        return {*self._successors, *self._starting}

    # Asking.

    async def ask(self, member: Member, answer: Awaitable[Any], what: str, timeout_s: float, setting: str) -> Any:
        """The answer of a member.

        Raises:
            MemberLostError: it is gone, or answered nothing at all in the time given, or has an engine that stands
                still; its successor is on its way.
            DeadlineError: it is late, but answered others meanwhile: it has too much to do.
            ArgumentLostError, ActorError: the call failed.
        """
        who, asked_at = f"{self.role} {member.index}", time.monotonic()
        try:
            with self._timeline.span(who, what):
                found = await within(before(member.gone, answer), timeout_s, f"{who} to {what}", setting)
        except OvertakenError as error:
            raise self._lost[member.index] from error
        except DeadlineError as error:
            if member.answered_at > asked_at:
                if not self._watch.is_still(member, asked_at):
                    raise
                error = DeadlineError(f"{error}; its engine stands still")
            raise self.lose(member, error) from error
        except self.fatal as error:
            raise self.lose(member, error) from error
        except RayTaskError as error:
            member.answered_at = time.monotonic()
            kind, log = ArgumentLostError if isinstance(error, ObjectLostError) else ActorError, self._log(member.index)
            raise kind(with_log(f"{who}, asked to {what}: {cause_of(error)}", log)) from error
        except DRIVERS_OWN:
            raise
        except RayError as error:  # its process is gone, its node is, or what it made
            raise self.lose(member, error) from error
        member.answered_at = time.monotonic()
        return found

    async def ask_in_turn(
        self,
        what: str,
        pick: Callable[[Sequence[Member]], Awaitable[Member]],
        ask: Callable[[Member], Awaitable[T]],
        is_finite: Callable[[T], bool],
    ) -> T:
        """What one member makes of a group, the next where it is lost at it, `supervision.max_attempts` at most: it may
        be the group that kills them. Those that were taken out, or lost with their node, do not count.

        Values that are not finite are the group's fault or the actor's: another one is asked. Where it has finite ones,
        or where the next group fares alike, the actor is sick, and replaced.

        Args:
            pick: who is asked next, one of those given only where there is no other.

        Raises:
            MemberLostError: the last one that was asked was lost, too.
            SickError: the group has no finite values.
        """
        doubted: list[Member] = []
        lost: list[Member] = []
        num_sick, attempts = 0, self._supervision.max_attempts
        while num_sick < attempts:
            member = await pick(doubted)
            try:
                answer = await ask(member)
            except MemberLeftError:
                continue
            except MemberLostError:
                lost.append(member)
                if num_sick + len(lost) >= attempts and num_sick + await self._blamed(lost) >= attempts:
                    raise
                continue
            if is_finite(answer):
                member.sick = 0
                for other in doubted:
                    words = f"not finite when it was asked to {what}, which {self.role} {member.index} finds finite"
                    self.lose(other, SickError(words))
                return answer
            num_sick, member.sick = num_sick + 1, member.sick + 1
            if member.sick >= SICK_GROUPS:
                self.lose(member, SickError(f"{SICK_GROUPS} groups in a row were not finite, the last to {what}"))
            elif doubted or len(self.serving) == 1:
                break
            else:
                doubted.append(member)
        raise SickError(f"{self.role} actors, asked to {what}, found values that are not finite")

    async def _blamed(self, lost: Sequence[Member]) -> int:
        """How many of the members that were lost at a group count: not those whose node is known to be gone by now."""
        at = [member.where.node_id for member in lost if member.where is not None and member.where.node_id]
        gone = [await self._places.is_gone(node_id) for node_id in at]
        return len(lost) - min(sum(gone), NODES_PER_GROUP)

    async def everywhere(
        self, ask: Callable[[Member], Awaitable[Any]], members: Iterable[Member] | None = None
    ) -> list[Any]:
        """What each member, of those that serve now or of those given, answers; a MemberLostError from one that was
        lost at it.
        """
        asked = list(self.serving.values() if members is None else members)
        answers = await asyncio.gather(*(ask(member) for member in asked), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, MemberLostError):
                raise answer
        return answers

    # Silence.

    def keep_watch(self) -> None:
        """From now on every member has to say that it lives."""
        if self._supervision.silence_s > 0:
            name = f"watch over {self.role}"
            self._watching = in_background(self._watch.run(), self._ended(name), name)

    def _ended(self, what: str) -> Callable[[str], None]:
        """Tells why a task of this roster ended too early."""
        return lambda why: self._incidents.report(f"{what} ended: {why}")

    # Losses and successors.

    def lose(self, member: Member, error: Exception) -> MemberLostError:
        """Kills a member, once, and sends for its successor; the error to raise."""
        index = member.index
        if self.serving.get(index) is member:
            del self.serving[index]
            tail = log_tail(self._log(index))
            self._open[index] = Loss(cause=cause_of(error), node=member.node, groups=member.groups, log_tail=tail)
            self._discard(index, member.handle, error)
            member.gone.set()
            if self._may_restart(index):
                name = f"successor of {self.role} {index}"
                self._successors[index] = in_background(self._succeed(index), self._ended(name), name)
            self.changed()
        return self._lost[index]

    def move(self, index: int, why: str, timeout_s: float, anew: Callable[[], None]) -> None:
        """Takes an actor off its node: it is asked nothing new, and ends when it has done what it has, or after so
        long; its successor starts in the bundle that `anew` makes of the old one, and no restart is counted.

        Args:
            anew: asks the cluster and may take a moment.
        """
        member = self._take_out(index, f"leaves its node: {why}")
        self._open[index] = Loss(cause=why, node=member.node, groups=member.groups)
        work, name = self._move(member, timeout_s, anew), f"move of {self.role} {index}"
        self._successors[index] = in_background(work, self._ended(name), name)

    async def _move(self, member: Member, timeout_s: float, anew: Callable[[], None]) -> None:
        index = member.index
        try:
            await self._end_when_done(member, timeout_s)
            try:
                await asyncio.to_thread(anew)
            except RayError as error:
                self._incidents.report(f"{self.role} {index} stays on its node: {cause_of(error)}")
            self._restarts[index].free()
            await self._succeed(index, "moved")
        finally:
            self._successors.pop(index, None)
            self.changed()

    def _take_out(self, index: int, why: str) -> Member:
        """From now on an actor is asked nothing new."""
        member = self.serving.pop(index)
        self._lost[index] = MemberLeftError(f"{self.role} {index} {why}")
        self._incidents.report(f"{self.role} {index} {why}; {len(self.serving)} serve")
        self.changed()
        return member

    async def _end_when_done(self, member: Member, timeout_s: float) -> None:
        """Ends an actor that was taken out; what it has not done after so long is asked of others."""
        until = time.monotonic() + timeout_s
        while member.groups > 0 and time.monotonic() < until:
            await asyncio.sleep(EMPTY_POLL_S)
        self._kill(member.handle)
        member.gone.set()

    def stop(self) -> None:
        """Ends every actor, those on their way included."""
        for task in (*self._successors.values(), *([self._watching] if self._watching else [])):
            task.cancel()
        for handle in [*(member.handle for member in self.serving.values()), *self._starting.values()]:
            self._kill(handle)

    def _discard(self, index: int, handle: Any, error: Exception) -> None:
        """Ends an actor, whatever is left of it, and says why."""
        lost = f"{self.role} {index} is lost: {cause_of(error)}"
        self._lost[index] = MemberLostError(with_log(lost, self._log(index)))
        self._kill(handle)
        again = self._may_restart(index)
        limit = f" ({self._restarts[index].limit})" if self._renew is not None else ""
        fate = "it is started again" if again else f"given up{limit}"
        self._incidents.report(f"{lost}; {fate}; {len(self.serving)} left")
        if not again:
            self._close(index, "given up", cause_of(error))

    def _close(self, index: int, outcome: Outcome, cause: str | None = None) -> None:
        loss, log = self._open.pop(index), self._log(index)
        incident = Incident(
            role=self.role,
            index=index,
            node=loss.node,
            cause=cause or loss.cause,
            log=str(log),
            # Where a successor failed, too, its own last words count.
            log_tail=log_tail(log) if cause else loss.log_tail,
            outcome=outcome,
            seconds=time.monotonic() - loss.at,
            groups=loss.groups,
        )
        self._incidents.add(incident)

    def _log(self, index: int) -> Any:
        return self._logs / f"{self.role}_{index}.log"

    def _may_restart(self, index: int) -> bool:
        return self._renew is not None and self._restarts[index].allowed

    async def _succeed(self, index: int, outcome: Outcome = "replaced") -> None:
        """Starts one successor after the other until one serves or the actor is given up."""
        try:
            while self._renew is not None and self._may_restart(index):
                meanwhile = f"{len(self.serving)} {self.role} left, and the run goes on with these until one has"
                await self._places.wait(index, meanwhile)
                self._restarts[index].begin()
                spare = None if self._spares is None else self._spares.take(index)
                handle = self._starting[index] = spare or self._renew(index)
                try:
                    words = await self._bring_up(index, handle)
                except self.start_faults as error:
                    if spare is not None or not await self._places.has_node(index):
                        self._restarts[index].take_back()
                    self._discard(index, handle, error)
                else:
                    self._incidents.report(f"{self.role} {index} serves again{words}")
                    self._close(index, outcome)
                    return
        finally:
            self._starting.pop(index, None)
            self._successors.pop(index, None)
            self.changed()

    async def _bring_up(self, index: int, handle: Any) -> str:
        """Makes a member of a new actor; what is to be added to the words that it serves again."""
        timeout_s, setting = self._settings.start_timeout_s, "rollout.start_timeout_s"
        where = await within(handle.ready.remote(), timeout_s, f"{self.role} {index} to start again", setting)
        self.serving[index] = Member(index=index, handle=handle, where=where)
        return ""
