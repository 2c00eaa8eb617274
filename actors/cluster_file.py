"""A cluster.yaml as records: its node types, and the machines that a table describes.

Owns: reading the two files, what a label selector means. Does not own: what is wrong in them (cluster_faults.py), or
who lands where (cluster_layout.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medtvt_rl.config_checks import ConfigError

MACHINE_KEY = {"aws": "InstanceType", "gcp": "machineType"}
"""Where a provider's node_config names the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One line of the table of machines; prices in US dollars an hour, `spot` None where the table has none."""

    cpus: float
    on_demand: float
    gpus: float = 0
    accelerator: str | None = None
    spot: float | None = None


@dataclass(frozen=True, slots=True)
class MachineTable:
    """What each provider's machines hold and cost.

    Attributes:
        as_of: when the prices were looked up.
    """

    path: str
    as_of: str
    regions: Mapping[str, str]
    machines: Mapping[str, Mapping[str, Machine]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """One of `available_node_types`; the head counts as one node that is always there."""

    name: str
    machine: str
    is_head: bool
    is_spot: bool
    min_nodes: int
    max_nodes: int
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def market(self) -> str:
        """In Ray's words."""
        return "spot" if self.is_spot else "on-demand"


def read_cluster(path: str | Path) -> dict[str, Any]:
    """The file as it stands.

    Raises:
        ConfigError: it is missing, not a YAML mapping, or made for kubectl.
    """
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cluster file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if any(isinstance(one, dict) and "apiVersion" in one for one in documents):
        raise ConfigError(f"{path}: a file for kubectl; expected one that `ray up` takes, such as cluster.yaml")
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(f"{path}: expected a mapping with available_node_types; cluster.yaml is an example")
    return documents[0]


def read_machines(path: str | Path) -> MachineTable:
    """The table of machines.

    Raises:
        ConfigError: it is missing, or a line has other fields than Machine.
    """
    content = read_cluster(path)
    machines: dict[str, dict[str, Machine]] = {}
    for provider in MACHINE_KEY:
        machines[provider] = {}
        for name, fields in (content.get(provider) or {}).items():
            try:
                machines[provider][name] = Machine(**fields)
            except TypeError as error:
                raise ConfigError(
                    f"{path}: {provider}.{name}: expected cpus, on_demand; maybe gpus, accelerator, spot ({error})"
                ) from error
    return MachineTable(
        path=str(path),
        as_of=str(content.get("as_of", "an unknown date")),
        regions=content.get("regions") or {},
        machines=machines,
    )


def provider_of(cluster: Mapping[str, Any]) -> str:
    """Its type: aws, gcp, local, ..."""
    return str((cluster.get("provider") or {}).get("type", ""))


def max_workers(cluster: Mapping[str, Any]) -> int | None:
    """Nodes beside the head, of all types; where the file doesn't say, what Ray takes for its provider."""
    if "max_workers" in cluster:
        return int(cluster["max_workers"])
    from ray.autoscaler._private.providers import _get_default_config

    usual = _get_default_config(cluster["provider"]).get("max_workers")
    return None if usual is None else int(usual)


def is_spot(node_config: Mapping[str, Any], provider: str) -> bool:
    """Whether the machine can be taken away."""
    if provider == "aws":
        return (node_config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
    entries = node_config.get("scheduling") or []
    entries = [entries] if isinstance(entries, dict) else entries
    return any(entry.get("preemptible") or entry.get("provisioningModel") == "SPOT" for entry in entries)


def node_types(cluster: Mapping[str, Any], table: MachineTable | None = None) -> list[NodeType]:
    """The node types of a file that Ray's validator has accepted, the head's first; none where it names machines that
    are there already.

    Args:
        table: says what a machine of AWS has where `resources` doesn't, as Ray asks AWS itself.
    """
    provider = provider_of(cluster)
    head = cluster.get("head_node_type")
    most = max_workers(cluster)  # of a type that doesn't say
    found = []
    known = table.machines.get(provider, {}) if table is not None and provider == "aws" else {}
    for name, node_type in (cluster.get("available_node_types") or {}).items():
        resources, node_config = node_type.get("resources") or {}, node_type.get("node_config") or {}
        machine = known.get(str(node_config.get(MACHINE_KEY.get(provider, ""), "")), Machine(cpus=0, on_demand=0))
        found.append(
            NodeType(
                name=name,
                machine=str(node_config.get(MACHINE_KEY.get(provider, ""), "")),
                is_head=name == head,
                is_spot=is_spot(node_config, provider),
                min_nodes=1 if name == head else int(node_type.get("min_workers") or 0),
                max_nodes=1 if name == head else int(node_type.get("max_workers", most or 0)),
                cpus=float(resources.get("CPU", machine.cpus)),
                gpus=float(resources.get("GPU", machine.gpus)),
                labels={str(key): str(value) for key, value in (node_type.get("labels") or {}).items()},
            )
        )
    return sorted(found, key=lambda node_type: not node_type.is_head)


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Ray's label selectors: "x", "!x", "in(x, y)", "!in(x, y)"."""
    for key, condition in selector.items():
        wanted = condition.removeprefix("!")
        values = re.split(r",\s*", wanted[3:-1]) if wanted.startswith("in(") else [wanted]
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True
