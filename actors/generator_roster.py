"""Which rollout generators serve: a successor loads the newest weights before it does.

Owns: the weights published last, and what a generator has to hold before it serves. Does not own: losses and successors
(roster.py), groups and what is asked of a generator (rollout_pool.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.roster import Bundles, Member, Roster
from actors.supervision import Incidents
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
