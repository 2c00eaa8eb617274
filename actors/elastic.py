"""Generators that come and go while a run lasts.

    policy says +1, or a node has room ---> bundle is reserved (an autoscaler starts a node for it) ---> it has its node
           ---> generator starts, loads the newest weights ---> serves
    policy says -1 ---> the slowest gets nothing new ---> has done what it had ---> ends ---> its node falls idle

Between `rollout.min` and `rollout.max`. What keeps a new one from serving is told, and the run goes on without it. The
bundle of one that was given up is given back, and another may come.

Owns: carrying out what is decided, bundles of generators that come and go. Does not own: the decision (a policy),
starting and ending a generator (rollout_pool.py), nodes (placement.py, and Ray's autoscaler).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.exceptions import RayError

from actors.bundles import Bundle, bundle_of
from actors.failure import cause_of
from medtvt_rl.config import Config
from medtvt_rl.dotted import resolve
from medtvt_rl.rollout.config import NEED, ROOM
from medtvt_rl.rollout.elastic import ElasticPolicy, Signals

logger = logging.getLogger(__name__)
NODE_POLL_S = 1.0
RETRY_S = 20.0
"""After one that did not come, or did not serve, no other is asked for for so long."""


class Policy(Protocol):
    """What f(config) makes, where `rollout.scaling` names f. It is asked after every step. What it raises is told in a
    line; it is not asked again then, and the run goes on with the generators that it has."""

    def decide(self, now: float, signals: Signals) -> int:
        """1: one generator more; -1: one less; 0: as it is. `now` in seconds of a clock that never goes back."""


class Asked:
    """A policy as a run asks it, also a simulated one: it may be the user's, and training does not hang on it.

    Args:
        name: as `rollout.scaling` has it.
        report: told in a line of what it raises.
    """

    def __init__(self, policy: Policy, name: str, report: Callable[[str], None]) -> None:
        self._policy: Policy | None = policy
        self._name, self._report = name, report

    def decide(self, now: float, signals: Signals) -> int:
        """See Policy; 0 from the moment on at which it raised."""
        if self._policy is None:
            return 0
        try:
            return int(self._policy.decide(now, signals) or 0)
        except Exception as error:
            self._policy = None
            self._report(f"no more generators come or go: rollout.scaling {self._name} raised {cause_of(error)}")
            return 0


class Generators(Protocol):
    """The pool, as far as it is needed here."""

    @property
    def serving(self) -> list[int]: ...

    @property
    def on_their_way(self) -> set[int]: ...

    async def add(self, index: int) -> bool: ...

    async def remove(self, index: int) -> None: ...

    def slowest(self) -> int: ...


class Seats(Protocol):
    """The placement, as far as it is needed here; every call asks the cluster and may take a moment."""

    def add(self, bundle: Bundle, room_first: bool = False) -> None: ...

    def remove(self, role: str, index: int) -> None: ...

    def has_node(self, role: str, index: int) -> bool: ...

    def has_room(self, bundle: Bundle) -> bool: ...

    def indices(self, role: str) -> list[int]: ...


class Elastic:
    """Keeps the number of generators where policy and limits want it.

    Args:
        report: told in a line of what comes, goes, or does not come.
    """

    def __init__(self, config: Config, generators: Generators, seats: Seats, report: Callable[[str], None]) -> None:
        self._config, self._settings = config, config.rollout
        self._generators, self._seats, self._report = generators, seats, report
        self._by_room = self._settings.scaling == ROOM
        self._policy = None if self._by_room else Asked(make_policy(config), self._settings.scaling, report)
        self._asked_for = self._settings.num_generators - len(generators.serving)
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._without_node = set[int]()
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._not_before = 0.0
        self._wish = 0

    @staticmethod
    def is_wanted(config: Config) -> bool:
        """Whether anything may come or go."""
        return config.rollout.least < config.rollout.most

    def observe(self, metrics: Mapping[str, float]) -> None:
        """A step's metrics, for the policy: who waited for whom. What it decides is carried out soon."""
        if self._policy is None:
            return
        serving = len(self._generators.serving)
        signals = Signals(
            seconds=metrics.get("seconds/step", 0.0),
            learner_waited_s=metrics.get("seconds/wait_groups", 0.0) + metrics.get("seconds/conclude", 0.0),
            generator_idle_s=metrics.get("seconds/rollout_idle", 0.0),
            generators=serving,
            starting=max(0, self._count() - serving),
        )
        # Steps may be shorter than the time between two looks: a decision waits for the next one.
        self._wish = self._policy.decide(time.monotonic(), signals) or self._wish

    async def run(self) -> None:
        """Goes on until it is cancelled; whoever is on the way then is left to `stop` of pool and placement."""
        try:
            while True:
                try:
                    await self._turn()
                except RayError as error:
                    self._report(f"generators stay as they are for now: {error}")
                await asyncio.sleep(self._settings.scaling_interval_s)
        finally:
            for task in (*self._coming.values(), *self._leaving.values()):
                task.cancel()

    async def _turn(self) -> None:
        """Those that the run asked for at its start come first; where room alone decides they are asked for until they
        serve."""
        await self._give_back()
        if self._by_room:
            self._asked_for = self._settings.num_generators - self._count()
        while self._asked_for > 0 and self._may_open():
            self._asked_for -= 1
            await self._open()
        wish = await self._wished()
        if wish > 0 and self._count() < self._settings.most and self._may_open():
            await self._open(room_first=self._by_room)
        elif wish < 0 and not self._coming and len(self._generators.serving) > self._settings.least:
            self._close()

    async def _give_back(self) -> None:
        """Bundles of generators that were given up. One that takes such a place has what is left of the restarts of
        the one before, and does not come before `rollout.elastic.cooldown_s` is over."""
        needed = {*self._generators.serving, *self._generators.on_their_way, *self._coming, *self._leaving}
        for index in set(self._seats.indices("rollout")) - needed:
            self._pause(max(RETRY_S, self._settings.elastic.cooldown_s))
            await asyncio.to_thread(self._seats.remove, "rollout", index)

    def _pause(self, seconds: float) -> None:
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _may_open(self) -> bool:
        return time.monotonic() >= self._not_before

    async def _wished(self) -> int:
        """The policy's last decision, once; where room alone decides 1 wherever there is some, which may be meant for
        those that still wait for theirs."""
        if self._by_room:
            if self._asked_for > 0 or self._without_node:
                return 0
            return int(await asyncio.to_thread(self._seats.has_room, self._bundle(self._next_index())))
        wish, self._wish = self._wish, 0
        return wish

    def _count(self) -> int:
        """Those that have a bundle: they serve, come, or wait for a node to come back."""
        return len(self._seats.indices("rollout")) - len(self._leaving)

    def _next_index(self) -> int:
        taken = set(self._seats.indices("rollout"))
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def _bundle(self, index: int) -> Bundle:
        return bundle_of(self._config, "rollout", index)

    async def _open(self, room_first: bool = False) -> None:
        index = self._next_index()
        await asyncio.to_thread(self._seats.add, self._bundle(index), room_first)
        self._without_node.add(index)
        self._coming[index] = asyncio.create_task(self._come(index), name=f"rollout {index} comes")

    async def _come(self, index: int) -> None:
        """From a bundle to a generator that serves; or the bundle is given back."""
        serves = False
        try:
            if await self._has_node(index):
                self._without_node.discard(index)
                serves = await self._generators.add(index)
        except RayError as error:
            self._report(f"rollout {index} does not come: {error}")
        finally:
            self._coming.pop(index, None)
            self._without_node.discard(index)
            if not serves:
                self._pause(RETRY_S)
                self._seats.remove("rollout", index)

    async def _has_node(self, index: int) -> bool:
        timeout_s = self._config.placement.timeout_s
        until = time.monotonic() + timeout_s
        while not await asyncio.to_thread(self._seats.has_node, "rollout", index):
            if time.monotonic() > until:
                self._report(
                    f"no node took one more generator within {timeout_s:g} s (placement.timeout_s): "
                    f"{self._bundle(index)}; the run goes on without it"
                )
                return False
            await asyncio.sleep(NODE_POLL_S)
        return True

    def _close(self) -> None:
        index = self._generators.slowest()
        self._leaving[index] = asyncio.create_task(self._go(index), name=f"rollout {index} leaves")

    async def _go(self, index: int) -> None:
        try:
            if index in self._generators.serving:  # else it was lost, or its node leaves
                await self._generators.remove(index)
                await asyncio.to_thread(self._seats.remove, "rollout", index)
        finally:
            self._leaving.pop(index, None)


def make_policy(config: Config) -> Policy:
    """What `rollout.scaling` names. Raises ValueError where it is no policy."""
    path = config.rollout.scaling
    if path == NEED:
        return ElasticPolicy(config.rollout.elastic, config.rollout.least, config.rollout.most)
    found: Any = resolve(path, "rollout.scaling")
    policy = found(config) if callable(found) else found
    if not callable(getattr(policy, "decide", None)):
        raise ValueError(f"rollout.scaling: {path!r} makes no policy; it needs decide(now, signals) -> -1, 0 or 1")
    made: Policy = policy
    return made
