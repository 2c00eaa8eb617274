"""Placement: the plan, and what is said when a bundle fits nowhere, on a real cluster of made-up nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.placement import PlacementError, grpo_roles, place, plan
from medtvt_rl.config import Config, load_config
from medtvt_rl.roles import RoleResources

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
L4, H100 = "ray.io/accelerator-type", "ray.io/accelerator-type"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = {"num_cpus": 2, "object_store_memory": 100 << 20}
    cluster.add_node(**node, num_gpus=1, labels={L4: "L4", "role": "rollout"})
    cluster.add_node(**node, num_gpus=2, labels={H100: "H100", "role": "learner"})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def declared(**roles: RoleResources) -> Config:
    config = load_config(QUICKSTART)
    for role, resources in roles.items():
        setattr(config.placement, role, resources)
    return config


def test_the_plan_names_every_actor_and_what_it_asks_for() -> None:
    config = declared(rollout=RoleResources(cpus=1, gpus=1, labels={L4: "in(L4, A10G)"}))
    config.rollout.num_generators = 2
    lines = [str(bundle) for bundle in plan(config, grpo_roles(config))]
    assert lines == [
        "learner 0: 1 CPU",
        "rollout 0: 1 CPU, 1 GPU on a node with ray.io/accelerator-type in(L4, A10G)",
        "rollout 1: 1 CPU, 1 GPU on a node with ray.io/accelerator-type in(L4, A10G)",
        "reference 0: 1 CPU",
        "reward 0: 1 CPU",
    ]


def test_no_reference_is_placed_without_a_kl_term() -> None:
    config = declared()
    config.grpo.loss.kl.coefficient = 0.0
    assert grpo_roles(config)["reference"] == 0


@pytest.mark.cluster
def test_every_role_lands_where_it_is_declared(cluster: Cluster) -> None:
    config = declared(
        rollout=RoleResources(cpus=1, gpus=1, labels={L4: "L4"}),
        learner=RoleResources(cpus=1, gpus=2, labels={H100: "H100"}),
    )
    placement = place(plan(config, {"learner": 1, "rollout": 1}), timeout_s=20)

    @ray.remote
    class Where:
        def label(self) -> str:
            return str(ray.get_runtime_context().get_node_labels()["role"])

    found = {
        role: ray.get(Where.options(**placement.options(role, 0)).remote().label.remote(), timeout=30)  # type: ignore[attr-defined]
        for role in ("rollout", "learner")
    }
    assert found == {"rollout": "rollout", "learner": "learner"}
    placement.release()


@pytest.mark.cluster
def test_a_bundle_that_fits_nowhere_is_named_with_what_the_cluster_offers(cluster: Cluster) -> None:
    config = declared(rollout=RoleResources(cpus=1, gpus=1, labels={L4: "B200"}))
    with pytest.raises(PlacementError) as caught:
        place(plan(config, {"reward": 1, "rollout": 1}), timeout_s=2)
    assert "rollout 0: 1 CPU, 1 GPU on a node with ray.io/accelerator-type B200 fits on no node" in str(caught.value)
    assert "2 GPU" in str(caught.value)
    assert "H100" in str(caught.value)
