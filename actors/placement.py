"""Which role runs where: a plan that can be printed, and the placement groups that carry it out.

Owns: bundles, labels, the message for what cannot be placed. Does not own: the actors themselves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medtvt_rl.config import Config, RoleResources

GANG = "learner"


class PlacementError(RuntimeError):
    """A bundle that no node of the cluster can take; the message names it and what the cluster offers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The resources of one actor."""

    role: str
    index: int
    cpus: float
    gpus: float
    labels: dict[str, str]

    @property
    def resources(self) -> dict[str, float]:
        """As a placement group takes them; a bundle may not be empty."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}

    @property
    def selector(self) -> dict[str, str]:
        """The labels as a placement group takes them: of `in(A, B)` it would only ever find A, for the space."""
        return {key: condition.replace(" ", "") for key, condition in self.labels.items()}

    def __str__(self) -> str:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        labels = ", ".join(f"{key} {value}" for key, value in self.labels.items())
        return f"{self.role} {self.index}: {wanted}" + (f" on a node with {labels}" if labels else "")


def plan(config: Config, roles: dict[str, int]) -> list[Bundle]:
    """The bundles of `roles` (name -> number of actors), in the order given."""
    bundles = []
    for role, count in roles.items():
        wanted: RoleResources = getattr(config.placement, role)
        for index in range(count):
            bundles.append(
                Bundle(role=role, index=index, cpus=wanted.cpus, gpus=wanted.gpus, labels=dict(wanted.labels))
            )
    return bundles


def grpo_roles(config: Config) -> dict[str, int]:
    """Number of actors of each role that GRPO starts."""
    needs_reference = config.grpo.loss.kl.coefficient > 0
    return {
        "learner": config.learner.num_workers,
        "rollout": config.rollout.num_generators,
        "reference": config.num_references if needs_reference else 0,
        "reward": config.num_scorers,
    }


def evaluation_generators(config: Config) -> int:
    """Generators of the evaluation stage."""
    return config.evaluation.num_generators or config.rollout.num_generators


def logical_cpus(config: Config) -> float:
    """CPUs that the largest stage asks for; a local Ray offers at least these."""
    grpo = sum(bundle.cpus for bundle in plan(config, grpo_roles(config)))
    supervised = max(config.pretrain.num_workers, config.sft.num_workers) * config.placement.learner.cpus
    evaluation = evaluation_generators(config) * config.placement.rollout.cpus
    return max(grpo, supervised, evaluation) + 1


class Placement:
    """Reserved bundles; `options(role, index)` are the actor options that put an actor into its own.

    The learners share one placement group: they come and go together. Every other actor has one of its own, which Ray
    moves to another node when its node dies, as soon as one has room.
    """

    def __init__(self, bundles: list[Bundle], groups: list[list[Bundle]], placed: list[PlacementGroup]) -> None:
        self.bundles = bundles
        self._seats = {
            (bundle.role, bundle.index): (group, position)
            for members, group in zip(groups, placed)
            for position, bundle in enumerate(members)
        }

    def options(self, role: str, index: int, spare: bool = False) -> dict[str, Any]:
        """Keyword arguments for `Actor.options(...)`; a spare sits beside the actor and asks for nothing."""
        group, position = self._seats[role, index]
        bundle = self._bundle(role, index)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=position)
        cpus, gpus = (0, 0) if spare else (bundle.resources.get("CPU", 0), bundle.gpus)
        return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}

    def count(self, role: str) -> int:
        """Bundles of a role."""
        return sum(bundle.role == role for bundle in self.bundles)

    def has_node(self, role: str, index: int) -> bool:
        """Whether a bundle has its place; not while its node is dead and no other has room. Asks the cluster."""
        group, _ = self._seats[role, index]
        return bool(placement_group_table(group)["state"] == "CREATED")

    def wanting(self, role: str, index: int) -> str:
        """What a bundle waits for, and what there is."""
        return f"{self._bundle(role, index)}. The cluster has {_offers()}"

    def release(self) -> None:
        """Gives the resources back; actors in it end."""
        for group in dict.fromkeys(group for group, _ in self._seats.values()):
            remove_placement_group(group)

    def _bundle(self, role: str, index: int) -> Bundle:
        return next(bundle for bundle in self.bundles if (bundle.role, bundle.index) == (role, index))


def place(bundles: list[Bundle], timeout_s: float) -> Placement:
    """Reserves every bundle, or raises PlacementError naming one that does not fit."""
    learners = [bundle for bundle in bundles if bundle.role == GANG]
    groups = [learners] if learners else []
    groups += [[bundle] for bundle in bundles if bundle.role != GANG]
    placed = [_reserve(members) for members in groups]
    deadline = time.monotonic() + timeout_s
    if not all(group.wait(max(0.1, deadline - time.monotonic())) for group in placed):
        for group in placed:
            remove_placement_group(group)
        raise PlacementError(_explain(bundles, timeout_s))
    return Placement(bundles, groups, placed)


def _reserve(bundles: list[Bundle]) -> PlacementGroup:
    return placement_group(
        [bundle.resources for bundle in bundles],
        strategy="PACK",
        bundle_label_selector=[bundle.selector for bundle in bundles],
    )


def _explain(bundles: list[Bundle], timeout_s: float) -> str:
    alone = next((bundle for bundle in bundles if not _fits_alone(bundle)), None)
    culprit = f"{alone} fits on no node" if alone else "each bundle fits alone, but all together do not"
    return f"placement waited {timeout_s:g} s (placement.timeout_s): {culprit}. The cluster has {_offers()}"


def _offers() -> str:
    return "; ".join(_describe(node) for node in ray.nodes() if node["Alive"])


def _fits_alone(bundle: Bundle) -> bool:
    group = _reserve([bundle])
    try:
        return bool(group.wait(2))
    finally:
        remove_placement_group(group)


def _describe(node: dict[str, Any]) -> str:
    amounts = ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    labels = {key: value for key, value in node.get("Labels", {}).items() if not key.startswith("ray.io/node")}
    return f"{node['NodeManagerAddress']} ({amounts}{', ' + str(labels) if labels else ''})"
