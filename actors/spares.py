"""Processes that have their imports done and wait to take the place of a lost actor.

A spare is an actor of the same class in the same bundle that asks for no resources of its own. Taking it saves the
start of a process and its imports, which is most of what a restart costs.

Owns: which there are. Does not own: what they import (the actors' `warm`), or when one is needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.process import Whereabouts

logger = logging.getLogger(__name__)


class Spares:
    """At most one spare for each index of a role.

    Args:
        wanted: 1, 0, or None for those whose node has memory to spare.
        make: a new actor in the bundle of an index, with no resources of its own.
        timeout_s, setting: deadline of its imports.
    """

    def __init__(
        self,
        role: str,
        wanted: int | None,
        make: Callable[[int], Any],
        timeout_s: float,
        setting: str,
        kill: Callable[[Any], None] = ray.kill,
    ) -> None:
        self._role, self._wanted, self._make, self._kill = role, wanted, make, kill
        self._timeout_s, self._setting = timeout_s, setting
        self._waiting: dict[int, Any] = {}
        self._ordered: dict[int, asyncio.Task[None]] = {}

    def order(self, index: int, beside: Whereabouts) -> None:
        """Starts a spare in the background, unless there is one, for the actor that runs `beside` it."""
        if self._wanted == 0 or index in self._waiting or index in self._ordered:
            return
        task = asyncio.create_task(self._prepare(index, beside), name=f"spare of {self._role} {index}")
        self._ordered[index] = task

    @property
    def ready(self) -> bool:
        """Whether there is any to be taken."""
        return bool(self._waiting)

    def take(self, index: int) -> Any | None:
        """A spare whose imports are done, which is the caller's from now on."""
        return self._waiting.pop(index, None)

    def drop(self, index: int) -> None:
        """Ends the spare of an index, also one that is on its way."""
        if (task := self._ordered.pop(index, None)) is not None:
            task.cancel()
        if (handle := self.take(index)) is not None:
            self._kill(handle)

    def stop(self) -> None:
        """Ends every spare."""
        for task in self._ordered.values():
            task.cancel()
        while self._waiting:
            self._kill(self._waiting.popitem()[1])

    async def _prepare(self, index: int, beside: Whereabouts) -> None:
        handle = self._make(index)
        ready = False
        try:
            answer = handle.warm.remote(beside.devices, self._wanted is not None)
            who = f"the spare of {self._role} {index} to import"
            ready = await within(answer, self._timeout_s, who, self._setting)
            if not ready:
                logger.info("no spare of %s %d: its node is short of memory", self._role, index)
        except (DeadlineError, RayError) as error:
            logger.warning("no spare of %s %d: %s", self._role, index, error)
        finally:
            self._ordered.pop(index, None)
            if ready:
                self._waiting[index] = handle
            else:
                self._kill(handle)
