"""What an actor waits for before it serves: a node for its bundle, and the end of its own start.

Owns: these waits, and what is made of a cluster that does not answer meanwhile. Does not own: bundles (placement.py),
who is started when (roster.py, learner_supervisor.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.failure import ActorError, cause_of, with_log
from actors.member import Bundles, Member
from actors.process import Whereabouts
from medtvt_rl.config import Config

PLACE_POLL_S = 1.0


class NoPlaceError(RuntimeError):
    """A bundle got no node in time; the message says what it waited for."""


class Places:
    """The bundles of a role, as far as they have nodes. Where the cluster does not answer nothing is known to have one,
    and none to be gone.

    Args:
        bundles: None where every bundle has its node.
        report: told in a line what is waited for.
    """

    def __init__(self, role: str, bundles: Bundles | None, report: Callable[[str], None]) -> None:
        self._role, self.bundles, self._report = role, bundles, report

    async def has_node(self, index: int) -> bool:
        """Whether the bundle of an actor has its place."""
        if self.bundles is None:
            return True
        try:
            return await asyncio.to_thread(self.bundles.has_node, self._role, index)
        except RayError:
            return False

    async def is_gone(self, node_id: str) -> bool:
        """Whether a node is known to have died, or to be taken away soon."""
        try:
            return self.bundles is not None and await asyncio.to_thread(self.bundles.is_gone, node_id)
        except RayError:
            return False

    async def wait(self, index: int, meanwhile: str, limit_s: float = math.inf) -> None:
        """Returns when the bundle of an actor has a node: at once, or when one has room for it. Raises NoPlaceError.

        Args:
            meanwhile: what becomes of the run, in words.
        """
        if await self.has_node(index):
            return
        deadline, wanting = time.monotonic() + limit_s, await self._wanting(index)
        self._report(f"no node has room for {wanting}; {meanwhile}")
        while not await self.has_node(index):
            if time.monotonic() > deadline:
                raise NoPlaceError(wanting)
            await asyncio.sleep(PLACE_POLL_S)

    async def _wanting(self, index: int) -> str:
        assert self.bundles is not None
        try:
            return await asyncio.to_thread(self.bundles.wanting, self._role, index)
        except RayError as error:
            return f"{self._role} {index}. The cluster does not answer: {cause_of(error)}"


async def started(config: Config, role: str, index: int, handle: Any, answer: Awaitable[Whereabouts]) -> Member:
    """A new actor as a member, once it answers that it is ready to serve.

    Raises:
        ActorError: it failed or is late, with the end of its log.
    """
    who, timeout_s = f"{role} {index}", config.rollout.start_timeout_s
    try:
        where = await within(answer, timeout_s, f"{who} to start", "rollout.start_timeout_s")
    except (RayError, DeadlineError) as error:
        log = config.folder / "logs" / f"{role}_{index}.log"
        raise ActorError(with_log(f"{who} did not start: {cause_of(error)}", log)) from error
    return Member(index=index, handle=handle, where=where)
