"""Placement: the plan, where roles land, fallbacks, and what is said when a bundle fits nowhere, on a real cluster of
made-up nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.bundles import grpo_roles, logical_cpus, plan
from actors.placement import Placement, PlacementError, place, placed
from medtvt_rl.config import Config, load_config
from medtvt_rl.roles import ACCELERATOR, MARKET, Fallback, PlacementConfig, RoleResources

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NODES: dict[str, dict[str, Any]] = {
    "l4": {"num_gpus": 1, "labels": {ACCELERATOR: "L4", MARKET: "spot", "role": "rollout"}},
    "a10g": {"num_gpus": 1, "labels": {ACCELERATOR: "A10G", MARKET: "on-demand", "role": "rollout"}},
    "h100": {"num_gpus": 2, "labels": {ACCELERATOR: "H100", MARKET: "on-demand", "role": "learner"}},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    plain = {"num_cpus": 4, "object_store_memory": 100 << 20}
    head = {**plain, "include_dashboard": False, "labels": {"role": "scoring", "name": "cpu"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for name, node in NODES.items():
        labels = {**node["labels"], "name": name}
        cluster.add_node(**{**plain, **node, "labels": labels})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def declared(**roles: RoleResources) -> Config:
    config = load_config(QUICKSTART)
    for role, resources in roles.items():
        setattr(config.placement, role, resources)
    return config


@ray.remote
class Where:
    """Says on which node it is, and how many GPUs it has."""

    def found(self) -> tuple[str, int]:
        context = ray.get_runtime_context()
        return str(context.get_node_labels()["name"]), len(context.get_accelerator_ids()["GPU"])


def landed(placement: Placement, seats: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[str, int]]:
    """(role, index) -> node and GPUs of an actor in its bundle."""
    actors = [Where.options(**placement.options(*seat)).remote() for seat in seats]  # type: ignore[attr-defined]
    found = ray.get([actor.found.remote() for actor in actors], timeout=60)
    return dict(zip(seats, found))


def test_the_plan_names_every_actor_and_what_it_asks_for() -> None:
    fallbacks = [Fallback(market="on-demand"), Fallback(gpus=0, cpus=8, market="any")]
    config = declared(
        rollout=RoleResources(gpus=1, accelerator=["L4", "A10G"], market="spot", fallbacks=fallbacks),
        reward=RoleResources(labels={"role": "scoring"}),
    )
    assert [str(bundle) for bundle in plan(config, grpo_roles(config))] == [
        "learner 0: 1 CPU",
        f"rollout 0: 1 CPU, 1 GPU on a node with {ACCELERATOR} in(L4,A10G), {MARKET} spot, "
        f"or else 1 CPU, 1 GPU on a node with {ACCELERATOR} in(L4,A10G), {MARKET} on-demand, or else 8 CPU",
        "reference 0: 1 CPU",
        "reward 0: 1 CPU on a node with role scoring",
    ]


def test_no_reference_is_placed_without_a_kl_term() -> None:
    config = declared()
    config.grpo.loss.kl.coefficient = 0.0
    assert grpo_roles(config)["reference"] == 0


def test_a_tensor_parallel_generator_asks_for_all_its_workers_at_once() -> None:
    config = load_config(
        QUICKSTART, ["rollout.tensor_parallel=4", "placement.rollout.gpus=1", "placement.rollout.cpus=2"]
    )
    assert [bundle.needs for bundle in plan(config, {"rollout": 2})] == ["8 CPU, 4 GPU"] * 2


def test_a_local_run_has_room_for_every_generator_that_may_join() -> None:
    assert logical_cpus(load_config(QUICKSTART, ["rollout.max=7"])) - logical_cpus(load_config(QUICKSTART)) == 6


@pytest.mark.cluster
def test_every_role_lands_where_it_is_declared_and_the_plan_is_drawn(cluster: Cluster) -> None:
    config = declared(
        rollout=RoleResources(gpus=1, accelerator=["L4", "A10G"]),
        learner=RoleResources(gpus=1, accelerator=["A10G", "H100"]),
        reward=RoleResources(labels={"role": "in(other, scoring)"}),
        reference=RoleResources(labels={"role": "scoring"}),
    )
    numbers = {"learner": 2, "rollout": 2, "reference": 1, "reward": 1}
    placement = place(plan(config, numbers), PlacementConfig(fallback_after_s=1.0), print)
    seats = [(role, index) for role, number in numbers.items() for index in range(number)]
    found = landed(placement, seats)
    assert [found[seat] for seat in seats if seat[0] == "learner"] == [("h100", 1)] * 2, "all learners on one kind"
    assert {found["rollout", 0], found["rollout", 1]} == {("l4", 1), ("a10g", 1)} and found["reward", 0] == ("cpu", 0)
    assert found["reference", 0] == ("cpu", 0)
    drawing = placement.drawing()
    assert "H100, on-demand, 4 CPU, 2 GPU\n  GPU [learner 0] [learner 1]" in drawing
    assert "CPU, 4 CPU, 0 GPU\n  CPU [reference 0] [reward 0]" in drawing
    assert sorted(kind.partition(" at ")[0] for kind in placement.kinds("rollout").values()) == [
        "A10G, on-demand",
        "L4, spot",
    ]
    placement.release()


@pytest.mark.cluster
def test_what_has_no_room_falls_back_and_a_broad_engine_gets_its_gpus_on_one_node(cluster: Cluster) -> None:
    fallbacks = [Fallback(market="on-demand", accelerator=["A10G"]), Fallback(gpus=0, cpus=3, market="any", labels={})]
    config = declared(
        rollout=RoleResources(gpus=1, market="spot", labels={"role": "rollout"}, fallbacks=fallbacks),
    )
    placement = place(plan(config, {"rollout": 3}), PlacementConfig(fallback_after_s=0.5), print)
    found = landed(placement, [("rollout", index) for index in range(3)])
    gpus = dict(found.values())
    assert len(gpus) == 3 and gpus.pop("l4") == 1 and gpus.pop("a10g") == 1 and list(gpus.values()) == [0]
    placement.release()
    config = declared(rollout=RoleResources(gpus=1))
    config.rollout.tensor_parallel = 2
    placement = place(plan(config, {"rollout": 1}), PlacementConfig(), print)
    assert landed(placement, [("rollout", 0)]) == {("rollout", 0): ("h100", 2)}
    placement.release()


@pytest.mark.cluster
def test_one_that_joins_later_waits_for_the_kinds_of_node_in_their_declared_order(cluster: Cluster) -> None:
    cpu = Fallback(gpus=0, market="any", labels={"role": "scoring"})
    spot = RoleResources(gpus=1, market="spot", labels={"role": "rollout"}, fallbacks=[cpu])
    bundles = plan(declared(rollout=spot), {"rollout": 3})
    placement = place(bundles[:1], PlacementConfig(fallback_after_s=0.5), print)
    placement.add(bundles[1], room_first=True)
    assert placement.bundle("rollout", 1).gpus == 0, "the L4 is taken"
    placement.add(bundles[2])
    assert placement.bundle("rollout", 2).gpus == 1, "nothing but time turns to the next kind"
    while placement.bundle("rollout", 2).gpus == 1:
        assert not placement.has_node("rollout", 2)
        time.sleep(0.1)
    late = [("rollout", 1), ("rollout", 2)]
    assert landed(placement, late) == dict.fromkeys(late, ("cpu", 0))
    placement.release()
    placement.add(bundles[0])  # as of a thread that was on its way
    again = place(bundles[:1], PlacementConfig(fallback_after_s=29.0), print)
    assert again.bundle("rollout", 0).gpus == 1, "nothing stays reserved after the end"
    again.release()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (RoleResources(gpus=1, accelerator=["B200"]), f"no node has {ACCELERATOR} B200 (they have A10G, H100, L4)"),
        (RoleResources(gpus=1, labels={"role": "scoring"}), "the nodes with its labels have 0 GPU at most"),
        (RoleResources(gpus=1, accelerator=["H100"], market="spot"), "no single node carries all of its labels"),
        (RoleResources(cpus=64), "the nodes have 4 CPU at most"),
        (RoleResources(labels={"zone": "a"}), "no node has zone a (none carries that label)"),
    ],
)
def test_what_fits_nowhere_is_named_with_what_the_cluster_offers(
    cluster: Cluster, wanted: RoleResources, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.placement.SAY_AFTER_S", 0.1)
    config = declared(rollout=wanted)
    told: list[str] = []
    with pytest.raises(PlacementError) as caught:
        asyncio.run(placed(plan(config, {"reward": 1, "rollout": 1}), PlacementConfig(timeout_s=0.5), told.append))
    said = str(caught.value)
    assert said.startswith("placement waited 0.5 s (placement.timeout_s): rollout 0: ") and "\n" not in said
    assert f"fits on no node: {expected}. The cluster has " in said
    assert f"{ACCELERATOR} H100" in said and "4 CPU, 2 GPU" in said
    early = told[0].removeprefix("placement waits, for at most 0.5 s in all: rollout 0: ")
    assert early != told[0] and f"fits on no node: {expected}. The cluster has " in early


@pytest.mark.cluster
def test_what_fits_alone_but_not_beside_the_others_is_named(cluster: Cluster) -> None:
    config = declared(rollout=RoleResources(gpus=1, accelerator=["L4"]))
    with pytest.raises(PlacementError, match=r"all together do not; without a place: rollout \d\. "):
        place(plan(config, {"rollout": 2}), PlacementConfig(timeout_s=1.0), print)
