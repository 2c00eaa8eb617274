"""What is wrong in a cluster.yaml, found without asking the cloud: Ray's own validator, and what that lets through.

Owns: one line per fault, with the place in the file and the mend. Does not own: the roles of a run (cluster_layout.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from actors.accelerators import known_accelerators, nearest
from actors.cluster_file import MACHINE_KEY, MachineTable, NodeType, max_workers, node_types, provider_of

# What a provider's call for new machines takes, as far as Ray hands it on.
NODE_CONFIG_KEYS = {
    "aws": """BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification DisableApiTermination
        EbsOptimized EnclaveOptions HibernationOptions IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior
        InstanceMarketOptions InstanceType KeyName LaunchTemplate LicenseSpecifications MetadataOptions Monitoring
        NetworkInterfaces Placement PrivateDnsNameOptions SecurityGroupIds SecurityGroups SubnetId SubnetIds
        TagSpecifications UserData""",
    "gcp": """acceleratorConfig acceleratorType advancedMachineFeatures canIpForward confidentialInstanceConfig
        deletionProtection description disks guestAccelerators hostname labels machineType metadata minCpuPlatform
        networkInterfaces networkPerformanceConfig params reservationAffinity resourcePolicies runtimeVersion scheduling
        schedulingConfig serviceAccounts shieldedInstanceConfig sourceInstanceTemplate sourceMachineImage tags""",
}
FILL_IN = "FILL-IN"


def ray_faults(cluster: Mapping[str, Any]) -> list[str]:
    """What Ray's validator says; the other checks need a file that passes it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(dict(cluster))))
    except Exception as error:  # it raises whatever the first wrong field leads to
        where = ".".join(str(step) for step in getattr(error, "absolute_path", ()))
        said = str(getattr(error, "message", error)).strip().splitlines()
        words = said[0] if said else type(error).__name__
        return [f"{where + ': ' if where else ''}Ray's validator: {type(error).__name__}: {words}"]
    return []


def overlooked_faults(cluster: Mapping[str, Any], table: MachineTable) -> list[str]:
    """What Ray's validator accepts and a cluster does not."""
    found: list[str] = []
    for node_type in node_types(cluster, table):
        raw = cluster["available_node_types"][node_type.name]
        place = f"available_node_types.{node_type.name}"
        checks = [
            _labels(raw.get("labels") or {}, node_type),
            _counts(node_type, cluster),
            _node_config(raw.get("node_config") or {}, provider_of(cluster)),
            _machine(node_type, provider_of(cluster), table),
        ]
        found += [f"{place}.{fault}" for check in checks for fault in check]
    return [*found, *_provider(cluster), *_tokens(cluster), *_images(cluster), *_unfilled(cluster)]


def _labels(labels: Mapping[str, Any], node_type: NodeType) -> Iterator[str]:
    from ray._private.label_utils import validate_node_label_syntax

    for key, value in labels.items():
        try:
            if not isinstance(value, str):
                raise ValueError(f"{value!r} is not text; put it between quotation marks")
            validate_node_label_syntax({key: value})
        except ValueError as error:
            yield f"labels.{key}: {' '.join(str(error).split())}"
    market = labels.get("ray.io/market-type")
    if market is not None and market != node_type.market:
        yield (
            f"labels.ray.io/market-type: it says {market!r}, but node_config asks for {node_type.market} machines; "
            "make the two alike"
        )
    known = known_accelerators()
    kind = labels.get("ray.io/accelerator-type")
    if kind is not None and kind not in known:
        yield f"labels.ray.io/accelerator-type: Ray knows no {kind!r}{nearest(str(kind), known)}"
    if kind is not None and not node_type.gpus:
        yield f"labels.ray.io/accelerator-type: it says {kind}, but resources has no GPU"
    if kind is None and node_type.gpus:
        yield "labels: a node type with GPUs needs ray.io/accelerator-type, or the autoscaler cannot tell which it has"


def _counts(node_type: NodeType, cluster: Mapping[str, Any]) -> Iterator[str]:
    if node_type.is_head:
        return
    if node_type.min_nodes > node_type.max_nodes:
        yield f"min_workers: {node_type.min_nodes} exceeds max_workers = {node_type.max_nodes}"
    total = max_workers(cluster)
    if total is not None and node_type.max_nodes > total:
        usual = "" if "max_workers" in cluster else ", Ray's default"
        yield f"max_workers: {node_type.max_nodes} exceeds max_workers = {total} of the whole cluster{usual}"


def _node_config(node: Mapping[str, Any], provider: str) -> Iterator[str]:
    if provider not in NODE_CONFIG_KEYS:
        return
    allowed = NODE_CONFIG_KEYS[provider].split()
    for key in node:
        if key not in allowed:
            yield f"node_config.{key}: {provider} has no such key{nearest(key, allowed)}"
    if provider == "aws":
        image = str(node.get("ImageId") or "")
        if not image:
            yield "node_config.ImageId: missing; name a machine image of the region, ami-..."
        elif FILL_IN not in image and not re.fullmatch(r"ami-[0-9a-f]{8,17}", image):
            yield f"node_config.ImageId: {image!r} is no machine image; expected ami- and 8 to 17 hexadecimal digits"
    else:
        disks = [disk for disk in node.get("disks") or [] if disk.get("boot")]
        images = [(disk.get("initializeParams") or {}).get("sourceImage") for disk in disks]
        if not any(images) and "sourceMachineImage" not in node:
            yield "node_config.disks: no boot disk with initializeParams.sourceImage; name a machine image"


def _machine(node_type: NodeType, provider: str, table: MachineTable) -> Iterator[str]:
    if provider not in table.machines:
        return
    key = f"node_config.{MACHINE_KEY[provider]}"
    machine = table.machines[provider].get(node_type.machine)
    if machine is None:
        hint = nearest(node_type.machine, table.machines[provider])
        yield f"{key}: {node_type.machine or 'missing'!r} is not in {table.path}{hint}; add a line if it exists"
        return
    for name, declared, real in (("CPU", node_type.cpus, machine.cpus), ("GPU", node_type.gpus, machine.gpus)):
        if declared > real:
            yield f"resources.{name}: {declared:g}, but a {node_type.machine} has {real:g}"
    kind = node_type.labels.get("ray.io/accelerator-type")
    if machine.accelerator not in (None, kind) and kind in known_accelerators():
        yield f"labels.ray.io/accelerator-type: it says {kind}, but a {node_type.machine} has {machine.accelerator}"


def _provider(cluster: Mapping[str, Any]) -> Iterator[str]:
    provider = cluster.get("provider") or {}
    region, zones = str(provider.get("region", "")), str(provider.get("availability_zone", ""))
    for zone in filter(None, (zone.strip() for zone in zones.split(","))):
        if region and not zone.startswith(region):
            yield f"provider.availability_zone: {zone} does not lie in provider.region = {region}"


def _tokens(cluster: Mapping[str, Any]) -> Iterator[str]:
    named: dict[str, str] = {}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in cluster.get(key) or []:
            if not re.search(r"\bray start\b", command):
                continue
            given = re.search(r"RAY_AUTH_TOKEN_PATH=([^\s;&]+)", command)
            if given and "RAY_AUTH_MODE=token" in command:
                named.setdefault(_from_home(given[1]), key)
            else:
                yield (
                    f"{key}: starts Ray without token authentication, so whoever reaches its ports may run code; "
                    "put `export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token;` before it"
                )
    sent = [_from_home(str(path)).rstrip("/") for path in cluster.get("file_mounts") or {}]
    for path, key in named.items():
        # Hosts that are there already may hold it.
        if provider_of(cluster) != "local" and not any(path == one or path.startswith(f"{one}/") for one in sent):
            yield (
                f"file_mounts: no node gets {path}, the token that {key} names (RAY_AUTH_TOKEN_PATH); "
                f'add "{path}": "~/.ray/auth_token"'
            )


def _from_home(path: str) -> str:
    """A path of a node, as file_mounts writes it."""
    return re.sub(r"^(\$HOME|\$\{HOME\})(?=/|$)", "~", path.strip("\"'"))


def _images(cluster: Mapping[str, Any]) -> Iterator[str]:
    """Containers of another Ray than the one that reads the file."""
    sections = {"docker": cluster.get("docker") or {}}
    for name, node_type in (cluster.get("available_node_types") or {}).items():
        sections[f"available_node_types.{name}.docker"] = node_type.get("docker") or {}
    for place, section in sections.items():
        for key in ("image", "head_image", "worker_image"):
            tag = re.fullmatch(r"rayproject/ray[\w-]*:(\d+\.\d+\.\d+)-?.*", str(section.get(key, "")))
            if tag and tag[1] != ray.__version__:
                yield f"{place}.{key}: it holds Ray {tag[1]}, but here is {ray.__version__}; name the same"


def _unfilled(cluster: Mapping[str, Any]) -> Iterator[str]:
    """Places that the file leaves to its reader; one line for a text, however often it stands there."""
    first: dict[str, str] = {}
    for place, text in _texts(cluster, ""):
        if FILL_IN in text:
            first.setdefault(text, place)
    for text, place in first.items():
        marked = next(word for word in re.split(r"[\s\"']+", text) if FILL_IN in word)
        yield f"{place}: still to be filled in: {marked}"


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every text in a nested value."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{index}]")
