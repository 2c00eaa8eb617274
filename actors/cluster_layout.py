"""Which role of a run would land on which machine of a cluster.yaml, what stays idle, and what it would cost.

Owns: a forecast, made as the autoscaler works: what is there is filled first, then the node type that is used best is
started. Does not own: the real placement (placement.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from actors.bundles import Bundle, evaluation_generators, grpo_bundles, plan
from actors.cluster_file import MachineTable, NodeType, matches
from medtvt_rl.config import Config
from medtvt_rl.roles import ACCELERATOR, GANG, MARKET

WORDS = {ACCELERATOR: "accelerator is", MARKET: "market is"}


@dataclass(slots=True)
class Node:
    """One machine, and the actors on it."""

    node_type: NodeType
    bundles: list[Bundle] = field(default_factory=list)

    @property
    def free_cpus(self) -> float:
        return self.node_type.cpus - sum(bundle.resources.get("CPU", 0) for bundle in self.bundles)

    @property
    def free_gpus(self) -> float:
        return self.node_type.gpus - sum(bundle.gpus for bundle in self.bundles)

    def has_room(self, bundle: Bundle) -> bool:
        """Whether one more actor fits, by labels and resources."""
        cpus = bundle.resources.get("CPU", 0)
        return (
            matches(bundle.labels, self.node_type.labels) and cpus <= self.free_cpus and bundle.gpus <= self.free_gpus
        )


@dataclass(slots=True)
class Layout:
    """The machines that a stage would use, and the actors that find no place."""

    nodes: list[Node]
    homeless: list[Bundle]

    @property
    def gpus(self) -> float:
        return sum(node.node_type.gpus for node in self.nodes)

    @property
    def idle_gpus(self) -> float:
        return sum(node.free_gpus for node in self.nodes)


def stage_bundles(config: Config, stages: Sequence[str] | None = None) -> dict[str, list[Bundle]]:
    """Stage -> the actors that it starts, of those stages (None: of `run.stages`) that start any."""
    bundles: dict[str, Callable[[], list[Bundle]]] = {
        "pretrain": lambda: plan(config, {"learner": config.pretrain.num_workers}),
        "sft": lambda: plan(config, {"learner": config.sft.num_workers}),
        "grpo": lambda: grpo_bundles(config),
        "evaluate": lambda: plan(config, {"rollout": evaluation_generators(config)}),
    }
    asked = config.run.stages if stages is None else stages
    return {stage: bundles[stage]() for stage in asked if stage in bundles}


def lay_out(bundles: Sequence[Bundle], types: Sequence[NodeType], max_workers: int | None) -> Layout:
    """Puts every actor somewhere, on the first of its kinds of node that has room; the largest actors first, as they
    are the hardest to place. The learners all get the same kind."""
    nodes = [Node(node_type) for node_type in types for _ in range(node_type.min_nodes)]
    homeless = []
    learners = [bundle for bundle in bundles if bundle.role == GANG]
    parties = [learners] if learners else []
    parties += [[bundle] for bundle in bundles if bundle.role != GANG]
    for party in sorted(parties, key=lambda members: (-members[0].gpus, -members[0].cpus)):
        kinds = list(zip(*(bundle.choices for bundle in party)))
        tried = [_seat(chosen, nodes, types, max_workers) for chosen in kinds]
        nodes, left = next((one for one in tried if not one[1]), tried[0])
        homeless += left
    return Layout(nodes, homeless)


def _seat(
    bundles: Sequence[Bundle], nodes: Sequence[Node], types: Sequence[NodeType], max_workers: int | None
) -> tuple[list[Node], list[Bundle]]:
    """The nodes with these actors on them, and the actors that found no place; what was given stays as it was."""
    nodes = [Node(node.node_type, list(node.bundles)) for node in nodes]
    left = []
    for bundle in bundles:
        node = next((node for node in sorted(nodes, key=_preference(bundle)) if node.has_room(bundle)), None)
        if node is None:
            node = _start(bundle, nodes, types, max_workers)
        if node is None:
            left.append(bundle)
        else:
            node.bundles.append(bundle)
    return nodes, left


def placement_faults(config: Config, types: Sequence[NodeType], max_workers: int | None) -> list[str]:
    """One line for each role that the cluster cannot take, with what it lacks of the role's first kind of node."""
    faults: dict[str, str] = {}
    for stage, bundles in stage_bundles(config).items():
        layout = lay_out(bundles, types, max_workers)
        counts = Counter(bundle.role for bundle in bundles)
        for role in dict.fromkeys(bundle.role for bundle in layout.homeless):
            left = [bundle for bundle in layout.homeless if bundle.role == role]
            place = f"placement.{role}" if hasattr(config.placement, role) else f"grpo.layout: {role}"
            faults.setdefault(role, f"{place}: {_why(left, counts[role], stage, types, max_workers)}")
    return list(faults.values())


def hourly_cost(counts: Mapping[str, int], types: Sequence[NodeType], machines: MachineTable, provider: str) -> float:
    """US dollars an hour of so many nodes of each type; a machine that the table lacks counts nothing."""
    total = 0.0
    for node_type in types:
        machine = machines.machines.get(provider, {}).get(node_type.machine)
        if machine is not None:
            spot = machine.spot if node_type.is_spot else None
            total += counts.get(node_type.name, 0) * (machine.on_demand if spot is None else spot)
    return total


def _preference(bundle: Bundle) -> Callable[[Node], tuple[bool, float, float]]:
    """An actor without a GPU goes to a node without one, if there is a choice; then to the fullest."""
    return lambda node: (bundle.gpus == 0 and node.node_type.gpus > 0, node.free_gpus, node.free_cpus)


def _start(bundle: Bundle, nodes: list[Node], types: Sequence[NodeType], max_workers: int | None) -> Node | None:
    """A further node of the type that this actor uses best; None where no more may be started."""
    workers = sum(not node.node_type.is_head for node in nodes)
    if max_workers is not None and workers >= max_workers:
        return None
    running = [node.node_type.name for node in nodes]
    fitting = [
        Node(node_type)
        for node_type in types
        if running.count(node_type.name) < node_type.max_nodes and Node(node_type).has_room(bundle)
    ]
    if not fitting:
        return None
    nodes.append(min(fitting, key=_preference(bundle)))
    return nodes[-1]


def _why(left: Sequence[Bundle], count: int, stage: str, types: Sequence[NodeType], max_workers: int | None) -> str:
    """What keeps these actors, all of one role, from being placed."""
    bundle = left[0]
    for key, condition in bundle.labels.items():
        carried = sorted({node_type.labels[key] for node_type in types if key in node_type.labels})
        if not any(matches({key: condition}, node_type.labels) for node_type in types):
            there = f"they carry {', '.join(carried)}" if carried else "none carries that label"
            return f"{WORDS.get(key, f'labels ask for {key}')} {condition}, which no node type has ({there})"
    labelled = [node_type for node_type in types if matches(bundle.labels, node_type.labels)]
    if not labelled:
        labels = ", ".join(f"{key} {value}" for key, value in bundle.labels.items())
        return f"no single node type carries all of its labels ({labels})"
    if not any(Node(node_type).has_room(bundle) for node_type in labelled):
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.resources.items())
        offered = "; ".join(f"{one.name} {one.cpus:g} CPU, {one.gpus:g} GPU" for one in labelled)
        return f"an actor asks for {wanted}, more than a node with its labels has ({offered})"
    limits = ", ".join(f"{one.name} {one.max_nodes}" for one in labelled)
    whole = f"; {max_workers} in all" if max_workers is not None else ""
    return (
        f"{len(left)} of {count} actors of {stage} find no place beside the others; at most so many nodes "
        f"may be started: {limits}{whole} (max_workers)"
    )
