"""`medtvt-rl check-cluster cluster.yaml -c configs/X.yaml`: what is wrong, who would run where, what it would cost.

Asks no cloud and starts nothing. Owns: the words on the terminal. Does not own: the checks (actors/cluster_*.py).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError
from pipelines.command import EXIT_FAILED, EXIT_USAGE, check_named, fail, load

if TYPE_CHECKING:
    from actors.cluster_file import MachineTable, NodeType
    from actors.cluster_layout import Layout

MACHINES = "configs/cluster/machines.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cluster", nargs="?", help="the file that `ray up` takes (default cluster.yaml)")
    parser.add_argument(
        "-c",
        "--config",
        nargs="+",
        required=True,
        metavar=("CONFIG", "key=value"),
        help="configuration of the run that it is meant for, and settings that override it",
    )
    parser.add_argument("--machines", default=MACHINES, help=f"what machines hold and cost (default {MACHINES})")


def command(args: argparse.Namespace) -> int:
    """0: a cluster that takes this run; 1: faults, one line each; 2: a file that cannot be read."""
    from actors.cluster_faults import overlooked_faults, ray_faults
    from actors.cluster_file import max_workers, node_types, read_cluster, read_machines
    from actors.cluster_layout import placement_faults

    try:
        path, overrides, cluster_file = _sorted(args)
        config = load(path, overrides)
        check_named(config, runs_here=False)
        cluster = read_cluster(cluster_file)
        table = read_machines(args.machines)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    faults = ray_faults(cluster)
    if not faults:
        types, limit = node_types(cluster, table), max_workers(cluster)
        faults = [f"{cluster_file}: {fault}" for fault in overlooked_faults(cluster, table)]
        if types:
            print("\n".join(describe(config, cluster, types, table)))
            faults += [f"{path}: {fault}" for fault in placement_faults(config, types, limit)]
        else:
            print("no forecast: what machines of your own offer is known once Ray runs on them (`ray status`)")
    else:
        faults = [f"{cluster_file}: {fault}" for fault in faults]
    for fault in faults:
        fail(fault, EXIT_FAILED)
    if faults:
        return EXIT_FAILED
    print(f"{cluster_file}: no fault found")
    return 0


def _sorted(args: argparse.Namespace) -> tuple[str, list[str], str]:
    """Configuration, overrides and cluster file, which may stand before the configuration or after it.

    Raises:
        ConfigError: there are two cluster files.
    """
    path, *given = args.config
    files = [*filter(None, [args.cluster]), *(each for each in given if "=" not in each)]
    if len(files) > 1:
        raise ConfigError(f"check-cluster: {' and '.join(files)}: name one cluster file; settings are key=value")
    return path, [each for each in given if "=" in each], files[0] if files else "cluster.yaml"


def describe(config: Config, cluster: dict[str, Any], types: Sequence[NodeType], table: MachineTable) -> list[str]:
    """The forecast as lines: of each stage who runs where, the GPUs that idle, and the cost."""
    from actors.bundles import grpo_bundles
    from actors.cluster_file import max_workers, provider_of
    from actors.cluster_layout import hourly_cost, lay_out, stage_bundles

    provider, limit = provider_of(cluster), max_workers(cluster)
    priced = bool(table.machines.get(provider))
    lines = []

    def sums(layout: Layout) -> str:
        counts = Counter(node.node_type.name for node in layout.nodes)
        cost = f"; about {hourly_cost(counts, types, table, provider):.2f} $ an hour" if priced else ""
        return f"GPUs: {layout.gpus:g}, of which {layout.idle_gpus:g} idle{cost}"

    for stage, bundles in stage_bundles(config).items():
        layout = lay_out(bundles, types, limit)
        lines += [f"{stage}:", *_nodes(layout), f"  {sums(layout)}"]
        asked = config.rollout.most
        if stage == "grpo" and asked > config.rollout.num_generators:
            grown = lay_out(grpo_bundles(config, asked), types, limit)
            placed = asked - sum(bundle.role == "rollout" for bundle in grown.homeless)
            lines.append(f"  grown to {placed} generators (rollout.max={asked}): {sums(grown)}")
    if not priced:
        return [*lines, f"no estimate of the cost: {table.path} has no machines of provider {provider!r}"]
    most = {node_type.name: node_type.max_nodes for node_type in types}
    lines.append(
        f"with every node type at its maximum: about {hourly_cost(most, types, table, provider):.2f} $ an hour"
    )
    region = table.regions.get(provider)
    where = "" if region == cluster["provider"].get("region") else f", of {region}, not of this cluster's region"
    lines.append(f"prices of {table.as_of}{where}, without disks and traffic: {table.path}; edit them to yours")
    return lines


def _nodes(layout: Layout) -> list[str]:
    """A line for all nodes of one type that hold the same, in the order in which they were started."""
    alike = Counter(
        (node.node_type.name, tuple(sorted(Counter(bundle.role for bundle in node.bundles).items())))
        for node in layout.nodes
    )
    types = {node.node_type.name: node.node_type for node in layout.nodes}
    lines = []
    for (name, roles), count in alike.items():
        node_type = types[name]
        kind = " ".join(filter(None, [node_type.machine, node_type.market]))
        actors = ", ".join(f"{number} {role}" for role, number in roles) or "no actor"
        lines.append(f"  {count} x {name} ({kind}): {actors}{' each' if count > 1 and roles else ''}")
    left = Counter(bundle.role for bundle in layout.homeless)
    lines += [f"  nowhere: {number} {role}" for role, number in left.items()]
    return lines


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["check-cluster", *sys.argv[1:]]))
