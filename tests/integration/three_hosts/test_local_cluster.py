"""The cluster file for hosts that are there already is the delivered one but for the machines."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import yaml
from hosts import PROJECT
from local_cluster import KEPT, local_cluster, offers

from actors.cluster_faults import ray_faults

NAMES = ("head", "learner", "learner2", "rollout", "scoring")
ADDRESSES = {name: f"10.77.0.{index}" for index, name in enumerate(NAMES, start=11)}


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "cluster.yaml").read_text())


def test_every_node_type_is_a_host_with_its_labels_the_head_first(cluster: dict[str, Any]) -> None:
    offered = offers(cluster, cpus=4)
    assert list(offered) == list(ADDRESSES)
    assert offered["head"] == "--labels=role=head,ray.io/market-type=on-demand --num-cpus=0 --num-gpus=0"
    assert offered["learner"] == offered["learner2"]
    assert offered["rollout"] == "--labels=role=rollout,ray.io/market-type=spot --num-cpus=4 --num-gpus=0"


def test_ray_takes_it_and_it_differs_in_machines_alone(cluster: dict[str, Any]) -> None:
    local = local_cluster(cluster, ADDRESSES)
    assert ray_faults(local) == []
    assert local["provider"] == {"type": "local", "head_ip": "10.77.0.11", "worker_ips": list(ADDRESSES.values())[1:]}
    same = [key for key in KEPT if local[key] == cluster[key]]
    assert set(KEPT) - set(same) == {"setup_commands", "head_start_ray_commands", "worker_start_ray_commands"}
    install = local["setup_commands"][0]
    assert install.endswith(f"; fi && ln -sfn {sys.prefix} .venv") and "setup.sh" not in install
    start = local["head_start_ray_commands"][-1]
    assert (
        "RAY_AUTH_MODE=token" in start
        and "~/ray_bootstrap_config.yaml $(cat /etc/ray_offer) && exit 0" in start
        and "--num-cpus" not in start
    )
