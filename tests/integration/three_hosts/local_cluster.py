"""cluster.yaml for hosts that are there already: the provider and the machines are others, all else is as delivered.

Owns: what of the delivered file is kept, what each host offers. Does not own: the hosts (hosts.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

KEPT = (
    "cluster_name",
    "upscaling_speed",
    "idle_timeout_minutes",
    "file_mounts",
    "rsync_exclude",
    "rsync_filter",
    "setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# A gang of learners is to span two machines.
TWICE = ("learner",)
INSTALL = "bash requirements/setup.sh"
PRIVATE_KEY = "~/.ssh/cluster"


def offers(cluster: Mapping[str, Any], cpus: int) -> dict[str, str]:
    """What the hosts tell `ray start`, one host for each node type, and NAME2 where there are two; the head first.

    Labels are those of the type, and CPUs are `cpus` where the type has any. No host has a GPU, so none is offered.
    """
    types = cluster["available_node_types"]
    names = sorted(types, key=lambda name: name != cluster["head_node_type"])
    hosts = [(host, name) for name in names for host in ([name, f"{name}2"] if name in TWICE else [name])]
    return {host: _offer(types[name], cpus) for host, name in hosts}


def _offer(node_type: Mapping[str, Any], cpus: int) -> str:
    # An accelerator that a host does not have is no label of it.
    labels = {key: value for key, value in node_type["labels"].items() if key != "ray.io/accelerator-type"}
    wanted = ",".join(f"{key}={value}" for key, value in labels.items())
    return f"--labels={wanted} --num-cpus={cpus if node_type['resources']['CPU'] else 0} --num-gpus=0"


def local_cluster(cluster: Mapping[str, Any], addresses: Mapping[str, str]) -> dict[str, Any]:
    """The file that `ray up` takes.

    Args:
        addresses: host name -> address, the head first.
    """
    head, *workers = addresses.values()
    local = {key: cluster[key] for key in KEPT}
    install, *others = local["setup_commands"]
    assert INSTALL in install, f"cluster.yaml's first setup command is another: {install}"
    # The packages are those of this Python; installing them thrice would take half an hour.
    local["setup_commands"] = [install.replace(INSTALL, f"ln -sfn {sys.prefix} .venv"), *others]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        local[key] = [_with_offer(command) for command in local[key]]
    return {
        **local,
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "auth": {"ssh_user": "root", "ssh_private_key": PRIVATE_KEY},
        "min_workers": len(workers),
        "max_workers": len(workers),
    }


def _with_offer(command: str) -> str:
    """Node types of a cloud carry labels and resources; hosts that are there already say them themselves."""
    if "ray start" not in command:
        return command
    start = command.replace(" --num-cpus=0", "") + " $(cat /etc/ray_offer)"
    # Ray gives a node 30 s to start; four at once on a busy machine may need more.
    again = f"for attempt in 1 2 3; do {start} && exit 0; ~/medtvt-rl/.venv/bin/ray stop --force; done; exit 1"
    # Memory is that of the machine, with all else that runs there: no host may end its actors for want of it.
    return f"export RAY_memory_monitor_refresh_ms=0; {again}"
