"""The nodes of the cluster that this process has joined: what they have, what is free, why an actor fits on none.

Owns: words and drawing. Does not own: reserving anything (placement.py), or a cluster that is only described
(cluster_layout.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state

from actors.bundles import Bundle
from actors.cluster_file import matches
from medtvt_rl.roles import ACCELERATOR, MARKET

AMOUNTS = ("GPU", "CPU")
NAMED = 3
"""So many nodes that are alike are named one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node that is alive; `total` and `free` are amounts by name, of CPU and GPU. One that `leaves` takes nobody."""

    node_id: str
    address: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]
    leaves: bool = False

    @property
    def kind(self) -> str:
        """Its accelerator and its market, as far as it has such labels; CPU where it has no GPU."""
        accelerator = self.labels.get(ACCELERATOR) or ("GPU" if self.total["GPU"] else "CPU")
        return ", ".join(filter(None, [accelerator, self.labels.get(MARKET)]))

    def would_take(self, bundle: Bundle) -> bool:
        """Whether one actor fits on it where it is empty."""
        return self._fits(bundle, self.total)

    def has_room(self, bundle: Bundle) -> bool:
        """Whether one more actor fits on it now."""
        return not self.leaves and self._fits(bundle, self.free)

    def _fits(self, bundle: Bundle, amounts: Mapping[str, float]) -> bool:
        enough = all(bundle.resources.get(name, 0) <= amounts[name] for name in AMOUNTS)
        return enough and matches(bundle.labels, self.labels)

    @property
    def left(self) -> str:
        """What is free on it, in words."""
        return f"{self.address} ({self.kind}) {amounts(self.free)}"

    def __str__(self) -> str:
        labels = {key: value for key, value in self.labels.items() if not key.startswith("ray.io/node")}
        words = ", ".join(f"{key} {value}" for key, value in labels.items())
        return f"{self.address} ({amounts(self.total)}{', ' if words else ''}{words})"


def nodes_now() -> list[NodeView]:
    """Asks the cluster; the free amounts may be a second old."""
    free, leaving = available_resources_per_node(), draining()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            node_id, resources = node["NodeID"], node["Resources"]
            left = free.get(node_id, {})
            found.append(
                NodeView(
                    node_id=node_id,
                    address=node["NodeManagerAddress"],
                    labels=node.get("Labels", {}),
                    total={name: resources.get(name, 0.0) for name in AMOUNTS},
                    free={name: left.get(name, 0.0) for name in AMOUNTS},
                    leaves=node_id in leaving,
                )
            )
    return found


def draining() -> dict[str, float]:
    """Nodes that will be taken away: seconds left by node id, infinite where nobody said. Asks the cluster."""
    now = time.time()
    return {node: at / 1000 - now if at else float("inf") for node, at in cluster_state.get_draining_nodes().items()}


def amounts(of: Mapping[str, float]) -> str:
    """Resources in words."""
    return ", ".join(f"{of.get(name, 0.0):g} {name}" for name in reversed(AMOUNTS))


def offers(nodes: Sequence[NodeView]) -> str:
    """What there is, nodes that are alike counted."""
    alike: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        alike[str(node).partition(" ")[2]].append(str(node))
    lines = ["; ".join(some) if len(some) <= NAMED else f"{len(some)} nodes {words}" for words, some in alike.items()]
    return "The cluster has " + ("; ".join(lines) or "no node")


def lacks(bundle: Bundle, nodes: Sequence[NodeView]) -> str:
    """Why one actor fits nowhere; empty where a node would take it."""
    for key, condition in bundle.labels.items():
        if not any(matches({key: condition}, node.labels) for node in nodes):
            carried = sorted({node.labels[key] for node in nodes if key in node.labels})
            there = f"they have {', '.join(carried)}" if carried else "none carries that label"
            return f"no node has {key} {condition} ({there})"
    labelled = [node for node in nodes if matches(bundle.labels, node.labels)]
    if not labelled:
        return "no single node carries all of its labels"
    for name in AMOUNTS:
        most = max(node.total[name] for node in labelled)
        if bundle.resources.get(name, 0) > most:
            where = "the nodes with its labels have" if bundle.labels else "the nodes have"
            return f"{where} {most:g} {name} at most"
    if not any(node.would_take(bundle) for node in labelled):
        return "no single node has all that it asks for"
    return ""


def draw(seats: Iterable[tuple[str, Bundle]], nodes: Sequence[NodeView]) -> str:
    """Who sits where, a block for each node that holds an actor.

    Args:
        seats: (node id, bundle).
    """
    by_node: dict[str, list[Bundle]] = defaultdict(list)
    for node_id, bundle in seats:
        by_node[node_id].append(bundle)
    known = {node.node_id: node for node in nodes}
    lines = []
    for node_id, bundles in by_node.items():
        node = known.get(node_id)
        lines.append(f"{node.address}  {node.kind}, {amounts(node.total)}" if node else "a node that has gone")
        with_gpu = [bundle for bundle in bundles if bundle.gpus > 0]
        if with_gpu:
            left = (node.total["GPU"] if node else 0) - sum(bundle.gpus for bundle in with_gpu)
            slots = [_slot(str(bundle.role), bundle.index, bundle.gpus) for bundle in with_gpu]
            slots += [f"[{left:g} free]"] if left > 0 else []
            lines.append("  GPU " + " ".join(slots))
        without = [f"[{bundle.role} {bundle.index}]" for bundle in bundles if bundle.gpus == 0]
        if without:
            lines.append("  CPU " + " ".join(without))
    return "\n".join(lines)


def _slot(role: str, index: int, gpus: float) -> str:
    return f"[{role} {index}]" if gpus == 1 else f"[{role} {index}, {gpus:g}]"
