"""Which rollout generators serve: a successor, or one that joins later, loads the newest weights before it does.

Published weights lie on the learner's node alone, and may go down with it: whoever misses them has the learner export
them again.

Owns: the weights published last, what a generator has to hold before it serves, coming and going. Does not own: losses
and successors (roster.py), when one comes or goes (elastic.py), what is asked of a generator (rollout_pool.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError

from actors.deadline import DeadlineError, within
from actors.failure import cause_of
from actors.member import Bundles, Member
from actors.roster import Roster
from actors.spares import Spares
from actors.supervision import Incidents, Restarts
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.faults import RoleLostError
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.weights import WeightBufferError

ExportAgain = Callable[[], Awaitable[tuple[Any, int, int]]]
"""What the learner holds now: a reference to the whole buffer, its version, its checksum."""


class WeightSyncError(RuntimeError):
    """An engine holds other weights than it was sent."""


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


class GeneratorRoster(Roster):
    """The generators of a run.

    Args:
        served: told the index and the place of a successor that serves.

    Attributes:
        publication: what a successor loads before it serves. Set it before any engine is asked to load it: a successor
            that comes up meanwhile then ends with it, too.
        export_again: asked where the weights of the publication are lost; None where nobody has them.
    """

    role = "rollout"
    start_faults = (RayError, DeadlineError, EngineBrokenError, WeightBufferError, WeightSyncError)
    fatal = (*Roster.fatal, EngineBrokenError, WeightBufferError)

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
        served: Callable[[Member], None] = lambda member: None,
    ) -> None:
        super().__init__(config, members, incidents, renew, kill, timeline, bundles, spares)
        self._served = served
        self.publication: Publication | None = None
        self.export_again: ExportAgain | None = None
        self._exporting = asyncio.Lock()

    async def published_again(self, lost: Publication) -> Publication:
        """What to load instead of weights that are lost: a later publication, or what the learner exports once more,
        once for all who miss them. Raises RoleLostError where the learner is lost for good."""
        assert self.export_again is not None
        async with self._exporting:
            if self.publication is lost:
                gone = f"the weights of version {lost.version} went down with a node"
                self._incidents.report(f"{gone}; the learner exports what it has now")
                # Cancelled in the midst of it the learner would end all its ranks.
                weights, version, checksum = await asyncio.shield(self.export_again())
                if self.publication is lost:
                    self.publication = Publication(weights=weights, version=version, checksum=checksum)
            assert self.publication is not None
            return self.publication

    async def _bring_up(self, index: int, handle: Any) -> str:
        """Makes a member of a new actor once it holds the newest weights."""
        config, who = self._settings, f"rollout {index}"
        started = handle.start.remote()
        where = await within(started, config.start_timeout_s, f"{who} to start again", "rollout.start_timeout_s")
        held: Publication | None = None
        while (newest := self.publication) is not None and newest is not held:
            what = f"{who} to load weights of version {newest.version}"
            loaded = handle.update_weights.remote(newest.weights, newest.version)
            try:
                newest.check(index, await within(loaded, config.update_timeout_s, what, "rollout.update_timeout_s"))
                held = newest
            except ObjectLostError:
                if self.export_again is None:
                    raise
                await self._replace_lost(newest)
        # Nothing was awaited since the comparison: no publication can have passed this generator by.
        member = self.serving[index] = Member(index=index, handle=handle, where=where)
        self._served(member)
        return f", from version {0 if held is None else held.version} on"

    async def _replace_lost(self, lost: Publication) -> None:
        """Has lost weights published again. Nobody can succeed any more where the learner is lost for good."""
        try:
            await self.published_again(lost)
        except RoleLostError as error:
            self._renew = None
            raise WeightSyncError(str(error).splitlines()[0]) from error

    # Coming and going while the run lasts.

    async def join(self, index: int) -> bool:
        """Starts one more actor, in a bundle that has its place; whether it serves. Restarts of one that had its number
        count as its own."""
        assert index not in self.serving
        if self._renew is None:
            return False
        self._restarts.setdefault(index, Restarts(self._supervision))
        handle = self._starting[index] = self._renew(index)
        try:
            words = await self._bring_up(index, handle)
        except self.start_faults as error:
            self._kill(handle)
            self._incidents.report(f"{self.role} {index} does not join: {cause_of(error)}")
            return False
        finally:
            self._starting.pop(index, None)
            self.changed()
        self._incidents.report(f"{self.role} {index} joins{words}; {len(self.serving)} serve")
        return True

    async def retire(self, index: int, timeout_s: float) -> None:
        """Takes an actor out: it is asked nothing new, and ends when it has done what it has, or after so long."""
        await self._end_when_done(self._take_out(index, "leaves"), timeout_s)
