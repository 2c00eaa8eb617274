"""Which rollout generators serve: a successor, or one that joins later, loads the newest weights before it does.

Owns: the weights published last, what a generator has to hold before it serves, coming and going. Does not own: losses
and successors (roster.py), when one comes or goes (elastic.py), what is asked of a generator (rollout_pool.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.failure import cause_of
from actors.member import Bundles, Member
from actors.roster import Roster
from actors.supervision import Incidents, Restarts
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.weights import WeightBufferError


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
        served: Callable[[Member], None] = lambda member: None,
    ) -> None:
        super().__init__(config, members, incidents, renew, kill, timeline, bundles)
        self._served = served
        self.publication: Publication | None = None

    async def _bring_up(self, index: int, handle: Any) -> str:
        """Makes a member of a new actor once it holds the newest weights."""
        config, who = self._settings, f"rollout {index}"
        started = handle.start.remote()
        where = await within(started, config.start_timeout_s, f"{who} to start again", "rollout.start_timeout_s")
        held: Publication | None = None
        while (newest := self.publication) is not None and newest is not held:
            what = f"{who} to load weights of version {newest.version}"
            loaded = handle.update_weights.remote(newest.weights, newest.version)
            newest.check(index, await within(loaded, config.update_timeout_s, what, "rollout.update_timeout_s"))
            held = newest
        # Nothing was awaited since the comparison: no publication can have passed this generator by.
        member = self.serving[index] = Member(index=index, handle=handle, where=where)
        self._served(member)
        return f", from version {0 if held is None else held.version} on"

    # Coming and going while the run lasts.

    async def join(self, index: int) -> bool:
        """Starts one more actor, in a bundle that has its place; whether it serves. Restarts of one that had its number
        count as its own."""
        assert self._renew is not None and index not in self.serving
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
