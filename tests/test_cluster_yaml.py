"""cluster.yaml as it is delivered: no fault but what its reader fills in, and a place for every role."""

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cluster_faults import overlooked_faults, ray_faults
from actors.cluster_file import matches, read_machines
from medtvt_rl.config import Config, load_config
from medtvt_rl.roles import PlacementConfig, RoleResources, node_kinds

ROOT = Path(__file__).resolve().parent.parent
TABLE = read_machines(ROOT / "configs/cluster/machines.yaml")
ROLES = [
    field.name
    for field in dataclasses.fields(PlacementConfig)
    if isinstance(getattr(PlacementConfig(), field.name), RoleResources)
]
# Where each role of a run is meant to live; a reference policy takes a GPU of the learner or one of its own.
NODE_TYPES_OF = {
    "learner": {"learner"},
    "rollout": {"rollout"},
    "reference": {"learner", "rollout"},
    "reward": {"scoring"},
}


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def hosts(cluster: dict[str, Any], role: str, wanted: RoleResources) -> set[str]:
    """The node types on which one actor of such resources can be placed."""
    return {
        name
        for name, node_type in cluster["available_node_types"].items()
        for kind in node_kinds(role, wanted)
        if matches(kind.labels, node_type["labels"])
        and kind.cpus <= node_type["resources"].get("CPU", 0)
        and kind.gpus <= node_type["resources"].get("GPU", 0)
    }


def test_only_what_is_the_readers_is_missing(cluster: dict[str, Any]) -> None:
    assert ray_faults(cluster) == []
    faults = overlooked_faults(cluster, TABLE)
    assert len(faults) == 2 and all("still to be filled in" in fault for fault in faults), faults


def test_every_node_type_says_what_it_is_for(cluster: dict[str, Any]) -> None:
    for name, node_type in cluster["available_node_types"].items():
        assert node_type["labels"]["role"] == name and "ray.io/market-type" in node_type["labels"]


def test_the_dashboard_is_on_loopback(cluster: dict[str, Any]) -> None:
    starts = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert starts and all("--dashboard-host=127.0.0.1" in command for command in starts)


def test_no_actor_lands_on_the_head(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in command for command in cluster["head_start_ray_commands"])


def test_no_folder_of_the_project_is_left_out_for_its_name(cluster: dict[str, Any]) -> None:
    # medtvt_rl/data has the name of a folder that is not sent.
    assert "/data" in cluster["rsync_exclude"] and all(name.startswith("/") for name in cluster["rsync_exclude"])
    assert cluster["rsync_filter"] == [".gitignore"] and "data" not in (ROOT / ".gitignore").read_text()


def test_a_stopped_job_has_time_for_its_checkpoint(cluster: dict[str, Any]) -> None:
    starts = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert all("export RAY_JOB_STOP_WAIT_TIME_S=300;" in command for command in starts)


def test_the_maxima_add_up(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert sum(node_type.get("max_workers", 0) for node_type in types.values()) == cluster["max_workers"]


def test_versions_are_those_of_the_project(cluster: dict[str, Any]) -> None:
    ray_version = re.search(r'"ray\[[^"]*==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    images = [cluster["docker"]["head_image"], cluster["docker"]["worker_image"]]
    images += [t["docker"]["worker_image"] for t in cluster["available_node_types"].values() if "docker" in t]
    assert {image.split(":")[1].removesuffix("-gpu") for image in images} == {f"{ray_version}-py311"}


@pytest.mark.parametrize(("has_gpu", "extra"), [(True, "cuda"), (False, "cpu")])
def test_a_node_gets_the_build_for_its_hardware(
    cluster: dict[str, Any], tmp_path: Path, has_gpu: bool, extra: str
) -> None:
    (tmp_path / "medtvt-rl" / "requirements").mkdir(parents=True)
    (tmp_path / "medtvt-rl" / "requirements" / "setup.sh").write_text('echo "$EXTRA ${TORCH_ARGS:-}"')
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {int(not has_gpu)}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", cluster["setup_commands"][0]], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == (
        [extra] if has_gpu else [extra, "--index-url", "https://download.pytorch.org/whl/cpu"]
    )


def test_every_role_has_a_node_type(cluster: dict[str, Any]) -> None:
    assert set(ROLES) == set(NODE_TYPES_OF)
    for role, names in NODE_TYPES_OF.items():
        wanted = RoleResources(cpus=1, gpus=0 if role == "reward" else 1, labels={"role": f"in({', '.join(names)})"})
        assert hosts(cluster, role, wanted) == names


def cluster_configs() -> list[Path]:
    """Configurations that place roles by label: those are written for this cluster."""
    return [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "labels:" in path.read_text()]


def test_who_waits_long_for_a_first_node_waits_as_long_for_the_next() -> None:
    configs = {path.name: load_config(path) for path in sorted((ROOT / "configs").glob("*.yaml"))}
    waiting = {name for name, one in configs.items() if one.placement.timeout_s > PlacementConfig().timeout_s}
    assert {path.name for path in cluster_configs()} <= waiting
    for name in waiting:
        assert configs[name].supervision.vacancy_timeout_s >= configs[name].placement.timeout_s, name
    example = (ROOT / "docs/cluster.md").read_text().split("```yaml\n")[1].split("```")[0]
    shown = yaml.safe_load(example)
    assert shown["supervision"]["vacancy_timeout_s"] >= shown["placement"]["timeout_s"]
    (on_cpu,) = (one for one in shown["placement"]["rollout"]["fallbacks"] if one.get("gpus") == 0)
    assert shown["rollout"]["engine"]["num_threads"] == on_cpu["cpus"], "it computes on what it reserves"


@pytest.mark.parametrize("path", cluster_configs(), ids=lambda path: path.stem)
def test_configurations_for_clusters_can_be_placed(cluster: dict[str, Any], path: Path) -> None:
    config: Config = load_config(path)
    for role in ROLES:
        wanted: RoleResources = getattr(config.placement, role)
        assert hosts(cluster, role, wanted), f"{path.name}: no node type can take {role} with {wanted}"
