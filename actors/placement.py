"""Bundles find their nodes: the placement groups that carry out a plan, and what is said where one cannot.

    declared kinds of node --> first choice --- no room for fallback_after_s ---> next choice --> ... --> PlacementError
                                    |                                                 |
                                    +---------------- a node has room ----------------+--> Placement

Owns: reserving, fallbacks, the message for what cannot be placed. Does not own: what an actor asks for (bundles.py),
what the nodes have (cluster_view.py), or the actors themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.bundles import Bundle, evaluation_generators, grpo_roles, logical_cpus, plan
from actors.cluster_view import draw, lacks, nodes_now, offers
from medtvt_rl.config import Config
from medtvt_rl.roles import GANG, PlacementConfig

__all__ = [
    "Bundle",
    "Placement",
    "PlacementError",
    "Placing",
    "evaluation_generators",
    "grpo_roles",
    "logical_cpus",
    "place",
    "placed",
    "plan",
]
POLL_S = 0.1
SAY_AFTER_S, SAY_AGAIN_S = 5.0, 60.0
"""A wait is told of after the first, and then every so often."""


class PlacementError(RuntimeError):
    """A bundle that no node of the cluster can take; the message names it and what the cluster offers."""


class Party:
    """Bundles that come and go together, on one of several kinds of node.

    Attributes:
        wanted: bundles, each with its fallbacks.
        chosen: those of the kind that is reserved now.
    """

    def __init__(self, wanted: Sequence[Bundle], fallback_after_s: float) -> None:
        self.wanted, self._fallback_after_s = list(wanted), fallback_after_s
        self._choice = 0
        self._waiting_since: float | None = None
        self.group: PlacementGroup
        self._reserve()

    @property
    def chosen(self) -> list[Bundle]:
        return [bundle.choices[self._choice] for bundle in self.wanted]

    def placed(self) -> bool:
        """Whether every bundle has its node. Asks the cluster."""
        found = bool(placement_group_table(self.group)["state"] == "CREATED")
        if found:
            self._waiting_since = None
        return found

    def try_next(self, again: bool = False) -> None:
        """Turns to the next kind of node once this one has had its time; after the last to the first, where `again`."""
        num_choices, now = len(self.wanted[0].choices), time.monotonic()
        self._waiting_since = self._waiting_since or now
        is_last = self._choice == num_choices - 1
        if num_choices == 1 or (is_last and not again) or now - self._waiting_since < self._fallback_after_s:
            return
        self.release()
        self._choice = (self._choice + 1) % num_choices
        self._reserve()

    def release(self) -> None:
        """Gives the resources back; actors in it end."""
        remove_placement_group(self.group)

    def _reserve(self) -> None:
        self._waiting_since = time.monotonic()
        self.group = placement_group(
            [bundle.resources for bundle in self.chosen],
            strategy="PACK",
            bundle_label_selector=[bundle.labels for bundle in self.chosen],
        )


class Placement:
    """Reserved bundles; `options(role, index)` are the actor options that put an actor into its own.

    The learners share one placement group: they come and go together. Every other actor has one of its own, which Ray
    moves to another node when its node dies, as soon as one has room.

    Bundles come and go while other threads look at it.
    """

    def __init__(self, parties: Sequence[Party], fallback_after_s: float) -> None:
        self._fallback_after_s = fallback_after_s
        self._seats: dict[tuple[str, int], tuple[Party, int]] = {}
        self._lock, self._released = Lock(), False
        for party in parties:
            self._seat(party)

    def options(self, role: str, index: int, spare: bool = False) -> dict[str, Any]:
        """Keyword arguments for `Actor.options(...)`; a spare sits beside the actor and asks for nothing."""
        party, position = self._seats[role, index]
        bundle = self.bundle(role, index)
        strategy = PlacementGroupSchedulingStrategy(party.group, placement_group_bundle_index=position)
        cpus, gpus = (0, 0) if spare else (bundle.resources.get("CPU", 0), bundle.gpus)
        return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}

    def bundle(self, role: str, index: int) -> Bundle:
        """The bundle that is reserved for an actor: its first choice or a fallback."""
        party, position = self._seats[role, index]
        return party.chosen[position]

    def seen_from(self, config: Config, role: str, index: int) -> Config:
        """The configuration with what the bundle of an actor really has: a fallback may be without a GPU."""
        chosen, workers = self.bundle(role, index), config.rollout.tensor_parallel if role == "rollout" else 1
        has = replace(getattr(config.placement, role), cpus=chosen.cpus / workers, gpus=chosen.gpus / workers)
        return replace(config, placement=replace(config.placement, **{role: has}))

    def count(self, role: str) -> int:
        """Bundles of a role."""
        return sum(one == role for one, _ in self._seats)

    def has_node(self, role: str, index: int) -> bool:
        """Whether a bundle has its place; not while its node is dead and no other has room. Asks the cluster.

        One that waits longer than `placement.fallback_after_s` turns to the next kind of node that would do.
        """
        party, _ = self._seats[role, index]
        if party.placed():
            return True
        if role != GANG:
            party.try_next(again=True)
        return False

    def wanting(self, role: str, index: int) -> str:
        """What a bundle waits for, and what there is."""
        party, position = self._seats[role, index]
        return f"{party.wanted[position]}. {offers(nodes_now())}"

    def is_gone(self, node_id: str) -> bool:
        """Whether a node has died, or will be taken away. Asks the cluster, which may learn of a death late."""
        return all(node.leaves for node in nodes_now() if node.node_id == node_id)

    def add(self, bundle: Bundle, room_first: bool = False) -> None:
        """Reserves one more bundle; `has_node` says when it is placed.

        Args:
            room_first: on a kind of node that has room now if there is one, instead of the kind that is declared first.
        """
        if room_first:
            nodes = nodes_now()
            first, *others = sorted(bundle.choices, key=lambda one: not any(node.has_room(one) for node in nodes))
            bundle = replace(first, fallbacks=tuple(replace(one, fallbacks=()) for one in others))
        self._seat(Party([bundle], self._fallback_after_s))

    def has_room(self, bundle: Bundle) -> bool:
        """Whether a node has room for one more bundle now. Asks the cluster."""
        return any(node.has_room(one) for node in nodes_now() for one in bundle.choices)

    def remove(self, role: str, index: int) -> None:
        """Gives a bundle that is nobody else's back; the actor in it ends."""
        with self._lock:
            party, _ = self._seats.pop((role, index))
        party.release()

    def renew(self, role: str, index: int) -> None:
        """Gives a bundle that is nobody else's back and reserves it anew, which may be elsewhere."""
        party, position = self._seats[role, index]
        self.add(party.wanted[position], room_first=True)
        party.release()

    def seats_on(self, node_id: str) -> list[tuple[str, int]]:
        """Role and index of the bundles on a node. Asks the cluster."""
        return [seat for seat in list(self._seats) if self.node_of(*seat) == node_id]

    def indices(self, role: str) -> list[int]:
        """Of the bundles of a role, those without a node included."""
        return [index for one, index in list(self._seats) if one == role]

    def kinds(self, role: str) -> dict[int, str]:
        """What kind of node each bundle of a role sits on, and where, in words. Asks the cluster."""
        nodes = {node.node_id: f"{node.kind} at {node.address}" for node in nodes_now()}
        found = {index: self.node_of(role, index) for index in self.indices(role)}
        return {index: nodes[node] for index, node in found.items() if node in nodes}

    def node_of(self, role: str, index: int) -> str | None:
        """Id of the node of a bundle, None where it has none. Asks the cluster."""
        seat = self._seats.get((role, index))
        if seat is None:  # it was given back meanwhile
            return None
        party, position = seat
        found: str | None = placement_group_table(party.group)["bundles_to_node_id"].get(position)
        return found or None

    def drawing(self) -> str:
        """Who sits where. Asks the cluster."""
        seats = [(node, self.bundle(*seat)) for seat in list(self._seats) if (node := self.node_of(*seat)) is not None]
        return draw(seats, nodes_now())

    def release(self) -> None:
        """Gives the resources back, also those that another thread is about to reserve; actors in it end."""
        with self._lock:
            self._released = True
            parties = dict.fromkeys(party for party, _ in self._seats.values())
        for party in parties:
            party.release()

    def _seat(self, party: Party) -> None:
        with self._lock:
            for position, bundle in enumerate(party.wanted):
                self._seats[bundle.role, bundle.index] = (party, position)
            too_late = self._released
        if too_late:
            party.release()


class Placing:
    """Bundles on their way to a place; left with an error, nothing stays reserved.

    Args:
        timeout_s: how long all of it may take.
        fallback_after_s: how long each kind of node is waited for where there is another.
        report: told in a line what is waited for.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        timeout_s: float,
        fallback_after_s: float,
        report: Callable[[str], None],
    ) -> None:
        self._timeout_s, self._fallback_after_s, self._report = timeout_s, fallback_after_s, report
        learners = [bundle for bundle in bundles if bundle.role == GANG]
        wanted = [learners] if learners else []
        wanted += [[bundle] for bundle in bundles if bundle.role != GANG]
        self._parties = [Party(members, fallback_after_s) for members in wanted]
        self._waiting = list(self._parties)
        self._began = time.monotonic()
        self._say_at = self._began + SAY_AFTER_S

    def look(self) -> Placement | None:
        """The placement once every bundle has its node, None before that; to be asked again soon.

        Raises:
            PlacementError: the time is over.
        """
        self._waiting = [party for party in self._waiting if not party.placed()]
        if not self._waiting:
            return Placement(self._parties, self._fallback_after_s)
        now = time.monotonic()
        for party in self._waiting:
            party.try_next()
        if now - self._began > self._timeout_s:
            raise PlacementError(f"placement waited {self._timeout_s:g} s (placement.timeout_s): {self._explain()}")
        if now > self._say_at:
            self._say_at = now + SAY_AGAIN_S
            self._report(f"placement waits, for at most {self._timeout_s:g} s in all: {self._explain()}")
        return None

    def __enter__(self) -> Placing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Gives everything back where it was not placed."""
        if kind is not None:
            for party in self._parties:
                party.release()

    def _explain(self) -> str:
        nodes = nodes_now()
        for party in self._waiting:
            for bundle in party.wanted:
                reasons = [lacks(choice, nodes) for choice in bundle.choices]
                if all(reasons):
                    return f"{bundle} fits on no node: {'; '.join(dict.fromkeys(reasons))}. {offers(nodes)}"
        waiting = ", ".join(f"{bundle.role} {bundle.index}" for party in self._waiting for bundle in party.wanted)
        first = self._waiting[0].wanted[0]
        free = "; ".join(node.left for node in nodes)
        return (
            f"each bundle fits alone, but all together do not; without a place: {waiting}. {first}. Free are {free}. "
            f"{offers(nodes)}"
        )


async def placed(bundles: Sequence[Bundle], settings: PlacementConfig, report: Callable[[str], None]) -> Placement:
    """`place`, beside whatever else the loop does; cancelled, it gives everything back."""
    placing = await asyncio.to_thread(Placing, bundles, settings.timeout_s, settings.fallback_after_s, report)
    with placing:
        while (found := await asyncio.to_thread(placing.look)) is None:
            await asyncio.sleep(POLL_S)
    return found


def place(bundles: Sequence[Bundle], settings: PlacementConfig, report: Callable[[str], None]) -> Placement:
    """Reserves every bundle, or raises PlacementError naming one that does not fit; `report` is told in a line what is
    waited for."""
    assert ray.is_initialized()
    with Placing(bundles, settings.timeout_s, settings.fallback_after_s, report) as placing:
        while (found := placing.look()) is None:
            time.sleep(POLL_S)
    return found
