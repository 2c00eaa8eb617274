"""cluster.yaml: Ray's own validator, and what that lets through."""

import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config

from medtvt_rl.config import Config, PlacementConfig, RoleResources, load_config

ROOT = Path(__file__).resolve().parent.parent
ROLES = [field.name for field in dataclasses.fields(PlacementConfig) if field.name != "timeout_s"]
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


def problems(cluster: dict[str, Any]) -> Iterator[str]:
    """What Ray's validator accepts and a cluster does not."""
    for name, node_type in cluster["available_node_types"].items():
        labels = node_type.get("labels", {})
        try:
            validate_node_label_syntax(labels)
        except ValueError as error:
            yield f"{name}: {error}"
        for required in ("role", "ray.io/market-type"):
            if required not in labels:
                yield f"{name}: no label {required}"
        node = node_type["node_config"]
        if not str(node.get("ImageId", "")).startswith("ami-"):
            yield f"{name}: no ImageId"
        unknown = set(node) - {"ImageId", "InstanceType", "InstanceMarketOptions", "BlockDeviceMappings"}
        if unknown:
            yield f"{name}: unknown keys in node_config {sorted(unknown)}"
        if ("InstanceMarketOptions" in node) != (labels.get("ray.io/market-type") == "spot"):
            yield f"{name}: the market type of the label is not that of the machine"
        if (node_type["resources"].get("GPU", 0) > 0) != ("ray.io/accelerator-type" in labels):
            yield f"{name}: a GPU node carries an accelerator type, another does not"
        if node_type.get("min_workers", 0) > node_type.get("max_workers", 0):
            yield f"{name}: min_workers exceeds max_workers"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in cluster[key]:
            if re.search(r"\bray start\b", command) and not (
                "RAY_AUTH_MODE=token" in command and "RAY_AUTH_TOKEN_PATH=" in command
            ):
                yield f"{key}: starts Ray without token authentication"


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Ray's label selectors: "x", "!x", "in(x, y)", "!in(x, y)"."""
    for key, condition in selector.items():
        wanted = condition.removeprefix("!")
        values = re.split(r",\s*", wanted[3:-1]) if wanted.startswith("in(") else [wanted]
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True


def hosts(cluster: dict[str, Any], wanted: RoleResources) -> set[str]:
    """The node types on which one actor of such resources can be placed."""
    return {
        name
        for name, node_type in cluster["available_node_types"].items()
        if matches(wanted.labels, node_type["labels"])
        and wanted.cpus <= node_type["resources"].get("CPU", 0)
        and wanted.gpus <= node_type["resources"].get("GPU", 0)
    }


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["provider"]["type"] == "aws"


def test_nothing_that_ray_overlooks(cluster: dict[str, Any]) -> None:
    assert list(problems(cluster)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda types: types["rollout"]["labels"].update(role="a b!"), "Invalid label"),
        (lambda types: types["rollout"].update(min_workers=9), "min_workers"),
        (lambda types: types["learner"]["node_config"].pop("ImageId"), "ImageId"),
        (lambda types: types["learner"]["node_config"].update(InstnceType="x"), "unknown keys"),
        (lambda types: types["rollout"]["node_config"].pop("InstanceMarketOptions"), "market type"),
        (lambda types: types["learner"]["labels"].pop("ray.io/accelerator-type"), "accelerator"),
        (lambda types: types["scoring"]["labels"].pop("role"), "no label role"),
    ],
)
def test_the_checks_find_what_ray_overlooks(cluster: dict[str, Any], change: Any, expected: str) -> None:
    change(cluster["available_node_types"])
    validate_config(prepare_config(copy.deepcopy(cluster)))
    assert any(expected in problem for problem in problems(cluster))


def test_a_start_command_without_a_token_is_found(cluster: dict[str, Any]) -> None:
    cluster["worker_start_ray_commands"][-1] = "ray start --address=$RAY_HEAD_IP:6379"
    assert list(problems(cluster)) == ["worker_start_ray_commands: starts Ray without token authentication"]


def test_the_dashboard_is_on_loopback(cluster: dict[str, Any]) -> None:
    starts = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert starts and all("--dashboard-host=127.0.0.1" in command for command in starts)


def test_no_actor_lands_on_the_head(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in command for command in cluster["head_start_ray_commands"])


def test_the_maxima_add_up(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert sum(node_type.get("max_workers", 0) for node_type in types.values()) == cluster["max_workers"]


def test_versions_are_those_of_the_project(cluster: dict[str, Any]) -> None:
    ray_version = re.search(r'"ray\[[^"]*==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    images = [cluster["docker"]["head_image"], cluster["docker"]["worker_image"]]
    images += [t["docker"]["worker_image"] for t in cluster["available_node_types"].values() if "docker" in t]
    assert {image.split(":")[1].removesuffix("-gpu") for image in images} == {f"{ray_version}-py311"}
    assert any("EXTRA=cuda" in command for command in cluster["setup_commands"])


def test_every_role_has_a_node_type(cluster: dict[str, Any]) -> None:
    assert set(ROLES) == set(NODE_TYPES_OF)
    for role, names in NODE_TYPES_OF.items():
        wanted = RoleResources(cpus=1, gpus=0 if role == "reward" else 1, labels={"role": f"in({', '.join(names)})"})
        assert hosts(cluster, wanted) == names


def cluster_configs() -> list[Path]:
    """Configurations that place roles by label: those are written for this cluster."""
    return [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "labels:" in path.read_text()]


@pytest.mark.parametrize("path", cluster_configs(), ids=lambda path: path.stem)
def test_configurations_for_clusters_can_be_placed(cluster: dict[str, Any], path: Path) -> None:
    config: Config = load_config(path)
    for role in ROLES:
        wanted: RoleResources = getattr(config.placement, role)
        assert hosts(cluster, wanted), f"{path.name}: no node type can take {role} with {wanted}"


def test_selectors_mean_what_ray_means() -> None:
    labels = {"role": "rollout", "ray.io/accelerator-type": "L4"}
    assert matches({"ray.io/accelerator-type": "in(L4, A10G)", "role": "!learner"}, labels)
    assert not matches({"ray.io/accelerator-type": "!in(L4,A10G)"}, labels)
    assert not matches({"role": "learner"}, labels) and not matches({"zone": "a"}, labels)
