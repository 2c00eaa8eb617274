"""What an actor of each role asks of the cluster: resources, accelerators, market, labels, and what else would do.

Owns: these settings, their checks, and the kinds of node that follow from them. Does not own: which node it becomes
(actors/placement.py), or which accelerators Ray knows (actors/accelerators.py). Importable without torch and Ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

ACCELERATOR, MARKET = "ray.io/accelerator-type", "ray.io/market-type"
"""Ray's own node labels: the autoscaler knows them, and Ray sets the first by itself where it finds a GPU."""
Market = Literal["any", "spot", "on-demand"]
GANG = "learner"
"""The role whose actors come and go together, on nodes of one kind."""


@dataclass
class Fallback:
    """Another kind of node for a role. What is None is as the role has it; without GPUs no accelerator is asked for.

    Attributes:
        see RoleResources.
    """

    cpus: float | None = None
    gpus: float | None = None
    accelerator: list[str] | None = None
    market: Market | None = None
    labels: dict[str, str] | None = None


@dataclass
class RoleResources:
    """What one actor of a role asks of the cluster.

    Attributes:
        cpus, gpus: per actor; of a generator, per worker: with `rollout.tensor_parallel: 4` one asks for four times as
            much, on one node.
        accelerator: types of GPU that will do, by Ray's names, e.g. [L4, A10G]; empty: any. All learners get the same:
            the first of them that has room for all.
        market: of the machine, as the node's label says.
        labels: other Ray node labels that the node must carry: "x", "!x", "in(x, y)", "!in(x, y)".
        fallbacks: kinds of node that are tried, in this order, where none of the first has room for
            `placement.fallback_after_s`.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    accelerator: list[str] = field(default_factory=list)
    market: Market = "any"
    labels: dict[str, str] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)


@dataclass
class PlacementConfig:
    """Where each role runs; a bundle that cannot be placed within `timeout_s` ends the run with its name.

    Attributes:
        fallback_after_s: how long each kind of node is waited for where there is another; longer than a node takes to
            start where an autoscaler starts them.
    """

    rollout: RoleResources = field(default_factory=RoleResources)
    learner: RoleResources = field(default_factory=RoleResources)
    reference: RoleResources = field(default_factory=RoleResources)
    reward: RoleResources = field(default_factory=RoleResources)
    timeout_s: float = 60.0
    fallback_after_s: float = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """A kind of node that will do, and what an actor takes of it; `labels` are Ray's label selectors."""

    cpus: float
    gpus: float
    labels: dict[str, str]


def declared(placement: PlacementConfig) -> Iterator[tuple[str, RoleResources | Fallback]]:
    """Every role and each of its fallbacks, with its key."""
    for each in fields(placement):
        wanted = getattr(placement, each.name)
        if isinstance(wanted, RoleResources):
            key = f"placement.{each.name}"
            yield key, wanted
            yield from ((f"{key}.fallbacks[{number}]", other) for number, other in enumerate(wanted.fallbacks))


def node_kinds(role: str, wanted: RoleResources) -> list[NodeKind]:
    """The kinds of node that a role accepts, the most wanted first."""
    found = []
    for one in [wanted, *(_instead(wanted, other) for other in wanted.fallbacks)]:
        types = [[name] for name in one.accelerator] if role == GANG and one.accelerator else [one.accelerator]
        found += [NodeKind(cpus=one.cpus, gpus=one.gpus, labels=_labels(one, names)) for names in types]
    return found


def label_selector(condition: str) -> str:
    """A condition in Ray's language. A blank after a comma would be taken for a part of the value."""
    return re.sub(r"\s*([(),])\s*", r"\1", condition.strip())


def check_placement(placement: PlacementConfig, tensor_parallel: int) -> None:
    """Raises ValueError naming the key of what cannot be placed anywhere."""
    for each in fields(placement):
        wanted = getattr(placement, each.name)
        if isinstance(wanted, RoleResources):
            _check_role(f"placement.{each.name}", wanted)
            for number, fallback in enumerate(wanted.fallbacks):
                key = f"placement.{each.name}.fallbacks[{number}]"
                _require(fallback != Fallback(), key, {}, "say what differs, e.g. {market: on-demand}, or leave it out")
                if fallback.accelerator:
                    gpus = wanted.gpus if fallback.gpus is None else fallback.gpus
                    _require(gpus > 0, f"{key}.gpus", gpus, "an accelerator is asked for; set 1 or more")
                _check_role(key, _instead(wanted, fallback))
            last_s = (len(node_kinds(each.name, wanted)) - 1) * placement.fallback_after_s
            mend = f"the last kind of node of {each.name} is tried after {last_s:g} s (fallback_after_s); set more"
            _require(placement.timeout_s > last_s, "placement.timeout_s", placement.timeout_s, mend)
    for kind in node_kinds("rollout", placement.rollout):
        _require(
            tensor_parallel == 1 or kind.gpus in (0, 1),
            "placement.rollout.gpus",
            kind.gpus,
            f"rollout.tensor_parallel = {tensor_parallel} gives one whole GPU to each worker of a generator; set 1",
        )


def _check_role(key: str, wanted: RoleResources) -> None:
    for name in ("cpus", "gpus"):
        value = getattr(wanted, name)
        _require(value >= 0, f"{key}.{name}", value, "set 0 or more")
    whole = wanted.gpus <= 1 or wanted.gpus == int(wanted.gpus)
    _require(whole, f"{key}.gpus", wanted.gpus, "Ray hands out parts of one GPU or whole ones; set a whole number")
    _require(
        not wanted.accelerator or wanted.gpus > 0,
        f"{key}.gpus",
        wanted.gpus,
        f"accelerator names {', '.join(wanted.accelerator)}, and the actor would use none; set 1, or drop accelerator",
    )
    for label, short, given in (
        (ACCELERATOR, "accelerator", bool(wanted.accelerator)),
        (MARKET, "market", wanted.market != "any"),
    ):
        _require(
            not (given and label in wanted.labels),
            f"{key}.labels",
            {label: wanted.labels.get(label)},
            f"{key}.{short} says it, too; keep one of the two",
        )


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {value!r}: {expected}")


def _instead(wanted: RoleResources, other: Fallback) -> RoleResources:
    """The role on the other kind of node."""
    gpus = wanted.gpus if other.gpus is None else other.gpus
    accelerator = wanted.accelerator if other.accelerator is None else other.accelerator
    return RoleResources(
        cpus=wanted.cpus if other.cpus is None else other.cpus,
        gpus=gpus,
        accelerator=list(accelerator) if gpus > 0 else [],
        market=wanted.market if other.market is None else other.market,
        labels=dict(wanted.labels if other.labels is None else other.labels),
    )


def _labels(wanted: RoleResources, accelerator: list[str]) -> dict[str, str]:
    """Label selectors in Ray's language."""
    labels = {key: label_selector(condition) for key, condition in wanted.labels.items()}
    if accelerator:
        labels[ACCELERATOR] = accelerator[0] if len(accelerator) == 1 else f"in({','.join(accelerator)})"
    if wanted.market != "any":
        labels[MARKET] = wanted.market
    return labels
