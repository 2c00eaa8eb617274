"""Nodes that will soon be taken away are emptied while they still answer.

    spot_notice.py, KubeRay, `ray drain-node` ---> Ray marks the node as draining ---> here, every second
        generators, scorers, references: asked nothing new, do what they have, start again on another node
        learners: a checkpoint after the step under way; the gang goes on until the node is gone

Ray itself places nothing new on such a node.

Owns: who sits on a node that leaves, and how much time there is. Does not own: ending and starting actors (roster.py),
bundles (placement.py), the notice of the cloud (spot_notice.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

from ray.exceptions import RayError

from actors.cluster_view import draining
from medtvt_rl.roles import GANG

POLL_S = 1.0
SPARED_S = 5.0
"""An actor must have ended so long before its node does."""
LEAST_S = 2.0
"""So long it may take in any case: the clock of its node may not be ours."""


@runtime_checkable
class Pool(Protocol):
    """Actors of a role, as far as they are needed here."""

    @property
    def serving(self) -> list[int]: ...

    def move(self, index: int, why: str, timeout_s: float, anew: Callable[[], None]) -> None: ...


class Seats(Protocol):
    """The placement, as far as it is needed here; every call asks the cluster and may take a moment."""

    def seats_on(self, node_id: str) -> list[tuple[str, int]]: ...

    def renew(self, role: str, index: int) -> None: ...


class Drain:
    """Watches for nodes that leave.

    Args:
        pools: by role; those without `serving` and `move` stay where they are.
        keep_soon: asks for a checkpoint, once for each node with learners on it; whether there will be one.
        longest_s: no actor is waited for longer, whatever time its node has left.
        leaving: seconds left by id of the node.
    """

    def __init__(
        self,
        pools: Mapping[str, Any],
        seats: Seats,
        keep_soon: Callable[[], bool],
        longest_s: float,
        report: Callable[[str], None],
        leaving: Callable[[], Mapping[str, float]] = draining,
    ) -> None:
        self._pools: dict[str, Pool] = {role: pool for role, pool in pools.items() if isinstance(pool, Pool)}
        self._seats, self._keep_soon = seats, keep_soon
        self._longest_s, self._report, self._leaving = longest_s, report, leaving
        self._with_learners: set[str] = set()
        self._moved: set[tuple[str, int, str]] = set()

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            try:
                await self._look()
            except RayError as error:
                self._report(f"cannot see which nodes will be taken away: {error}")
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        for node_id, seconds in (await asyncio.to_thread(self._leaving)).items():
            for role, index in await asyncio.to_thread(self._seats.seats_on, node_id):
                if role == GANG:
                    self._keep(node_id)
                elif self._is_to_move(role, index, node_id):
                    self._moved.add((role, index, node_id))
                    self._move(role, index, seconds)

    def _is_to_move(self, role: str, index: int, node_id: str) -> bool:
        known = role in self._pools and (role, index, node_id) not in self._moved
        return known and index in self._pools[role].serving

    def _move(self, role: str, index: int, seconds: float) -> None:
        timeout_s = min(self._longest_s, max(LEAST_S, seconds - SPARED_S))
        anew = partial(self._seats.renew, role, index)
        self._pools[role].move(index, f"it will be taken away{_within(seconds)}", timeout_s, anew)

    def _keep(self, node_id: str) -> None:
        if node_id not in self._with_learners:
            self._with_learners.add(node_id)
            fate = "a checkpoint follows the step under way" if self._keep_soon() else "no checkpoints are kept"
            self._report(f"a node of the learners will be taken away: {fate}")


def _within(seconds: float) -> str:
    return "" if seconds == float("inf") else f" in {max(0.0, seconds):.0f} s"
