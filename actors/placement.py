"""Which role runs where: a plan that can be printed, and the placement group that carries it out.

Owns: bundles, labels, the message for what cannot be placed. Does not own: the actors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medtvt_rl.config import Config, RoleResources


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
    """A reserved placement group; `options(role, index)` are the actor options that put an actor into its bundle."""

    def __init__(self, bundles: list[Bundle], group: PlacementGroup) -> None:
        self.bundles = bundles
        self._group = group

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Keyword arguments for `Actor.options(...)`."""
        position = next(i for i, b in enumerate(self.bundles) if (b.role, b.index) == (role, index))
        bundle = self.bundles[position]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=position)
        return {"num_cpus": bundle.resources.get("CPU", 0), "num_gpus": bundle.gpus, "scheduling_strategy": strategy}

    def count(self, role: str) -> int:
        """Bundles of a role."""
        return sum(bundle.role == role for bundle in self.bundles)

    def release(self) -> None:
        """Gives the resources back; actors in it end."""
        remove_placement_group(self._group)


def place(bundles: list[Bundle], timeout_s: float) -> Placement:
    """Reserves every bundle, or raises PlacementError naming one that does not fit."""
    group = placement_group(
        [bundle.resources for bundle in bundles],
        strategy="PACK",
        bundle_label_selector=[bundle.labels for bundle in bundles],
    )
    if not group.wait(timeout_s):
        remove_placement_group(group)
        raise PlacementError(_explain(bundles, timeout_s))
    return Placement(bundles, group)


def _explain(bundles: list[Bundle], timeout_s: float) -> str:
    alone = next((bundle for bundle in bundles if not _fits_alone(bundle)), None)
    culprit = f"{alone} fits on no node" if alone else "each bundle fits alone, but all together do not"
    offers = "; ".join(_describe(node) for node in ray.nodes() if node["Alive"])
    return f"placement waited {timeout_s:g} s (placement.timeout_s): {culprit}. The cluster has {offers}"


def _fits_alone(bundle: Bundle) -> bool:
    group = placement_group([bundle.resources], bundle_label_selector=[bundle.labels])
    try:
        return bool(group.wait(2))
    finally:
        remove_placement_group(group)


def _describe(node: dict[str, Any]) -> str:
    amounts = ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    labels = {key: value for key, value in node.get("Labels", {}).items() if not key.startswith("ray.io/node")}
    return f"{node['NodeManagerAddress']} ({amounts}{', ' + str(labels) if labels else ''})"
