"""configs/cluster/: the cluster of Google Cloud and that of Kubernetes offer what cluster.yaml offers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from actors.cluster_faults import overlooked_faults, ray_faults
from actors.cluster_file import NodeType, node_types, read_cluster, read_machines
from actors.cluster_layout import placement_faults
from medtvt_rl.config import load_config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs/cluster"
TABLE = read_machines(FOLDER / "machines.yaml")
DOCS = (ROOT / "docs/cluster.md").read_text()


@pytest.fixture
def manifests() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())}


def groups(manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return manifests["RayCluster"]["spec"]["workerGroupSpecs"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def test_google_cloud_has_no_fault_but_what_its_reader_fills_in() -> None:
    cluster = read_cluster(FOLDER / "gcp.yaml")
    assert ray_faults(cluster) == []
    faults = overlooked_faults(cluster, TABLE)
    assert len(faults) == 2 and all("still to be filled in" in fault for fault in faults), faults


def test_google_cloud_differs_from_aws_in_machines_alone() -> None:
    aws, gcp = read_cluster(ROOT / "cluster.yaml"), read_cluster(FOLDER / "gcp.yaml")
    for key in (
        "docker",
        "head_start_ray_commands",
        "file_mounts",
        "rsync_exclude",
        "setup_commands",
    ):
        assert aws[key] == gcp[key], key
    *starts, watches = aws["worker_start_ray_commands"]
    assert gcp["worker_start_ray_commands"] == [*starts, watches.replace("spot_notice aws", "spot_notice gcp")]
    assert "actors.spot_notice aws" in watches
    assert [(one.name, one.is_spot, one.max_nodes, one.labels["role"]) for one in node_types(aws)] == [
        (one.name, one.is_spot, one.max_nodes, one.labels["role"]) for one in node_types(gcp)
    ]


def test_a_disk_without_an_image_is_found() -> None:
    cluster = read_cluster(FOLDER / "gcp.yaml")
    cluster["available_node_types"]["scoring"]["node_config"]["disks"] = [{"boot": True}]
    assert any("scoring.node_config.disks: no boot disk" in fault for fault in overlooked_faults(cluster, TABLE))


def test_kubernetes_takes_the_configuration_for_clusters(manifests: dict[str, dict[str, Any]]) -> None:
    offered = []
    for group in groups(manifests):
        resources = container(group)["resources"]
        offered.append(
            NodeType(
                name=group["groupName"],
                machine="",
                is_head=False,
                is_spot=group["labels"]["ray.io/market-type"] == "spot",
                min_nodes=group["minReplicas"],
                max_nodes=group["maxReplicas"],
                cpus=float(resources["requests"]["cpu"]),
                gpus=float(resources["limits"].get("nvidia.com/gpu", 0)),
                labels=group["labels"],
            )
        )
    assert placement_faults(load_config(ROOT / "configs/on_cluster.yaml"), offered, None) == []


def test_kubernetes_starts_the_job_on_its_own_cluster(manifests: dict[str, dict[str, Any]]) -> None:
    assert list(manifests) == ["RayCluster", "RayJob"]
    cluster, job = manifests["RayCluster"], manifests["RayJob"]
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert cluster["spec"]["rayVersion"] == ray.__version__ and cluster["spec"]["authOptions"] == {"mode": "token"}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    configuration = job["spec"]["entrypoint"].partition("-c configs/")[2].rstrip("'")
    assert (ROOT / "configs" / configuration).is_file()
    assert f"ray:{ray.__version__}-py311" in (FOLDER / "Dockerfile").read_text()


def test_the_image_takes_the_build_that_the_documented_command_names() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    taken = dict(line.removeprefix("ARG ").split("=", 1) for line in lines if line.startswith("ARG "))
    assert taken == {"EXTRA": "cuda", "TORCH_ARGS": ""}
    run = lines.index("RUN bash requirements/setup.sh")  # which reads both from the environment
    assert all(lines.index(f"ARG {name}={value}") < run for name, value in taken.items())
    command = re.search(r"docker build -f configs/cluster/Dockerfile.*?medtvt-rl:cpu.*? \.\n", DOCS, re.DOTALL)
    words = shlex.split(command[0].replace("\\\n", " "))
    given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--build-arg")
    cpu = read_cluster(ROOT / "cluster.yaml")["setup_commands"][0]
    assert given["EXTRA"] == "cpu" and f'TORCH_ARGS="{given["TORCH_ARGS"]}"' in cpu and set(given) == set(taken)


def test_kubernetes_mounts_only_volumes_that_exist(manifests: dict[str, dict[str, Any]]) -> None:
    for group in [manifests["RayCluster"]["spec"]["headGroupSpec"], *groups(manifests)]:
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        mounted = {mount["name"] for mount in container(group)["volumeMounts"]}
        assert mounted == volumes and "shared" in volumes
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == 1000, "`ray` may write to the claim"
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0)
