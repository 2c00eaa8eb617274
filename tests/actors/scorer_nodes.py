"""Two scorers on two nodes of a real cluster, for tests in which a node goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.member import Member
from actors.placement import Placement, place, plan
from actors.process import Whereabouts, whereabouts
from actors.scoring_pools import ScorerPool, ScorerRoster
from actors.supervision import Incidents
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.roles import RoleResources

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20, "labels": {"role": "reward"}}


@ray.remote(concurrency_groups={"health": 1})  # type: ignore[call-overload]
class Scorer:
    """Says where it scored a group."""

    def ready(self) -> Whereabouts:
        return whereabouts()

    @ray.method(concurrency_group="health")
    def health(self) -> None: ...

    def score(self, group: str) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    settings = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False, "_system_config": settings}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@dataclass
class Scorers:
    """The pool of the two, where they sit, and what it has told."""

    roster: ScorerRoster
    pool: Any
    placement: Placement
    nodes: list[Any]
    told: list[str] = field(default_factory=list)

    async def score(self, how_many: int) -> list[str]:
        """The nodes on which so many groups were scored at once."""
        return await asyncio.gather(*(self.pool.score(f"{i}") for i in range(how_many)))


def join_two_nodes(cluster: Cluster, folder: Path) -> tuple[Config, list[Any]]:
    """A node for each of two scorers; the configuration that places them there."""
    nodes = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    ray.init(address=cluster.address, log_to_driver=False)
    config = Config(run=RunConfig(name="r", root=str(folder)), num_scorers=2, score_timeout_s=60.0)
    config.placement.reward = RoleResources(cpus=1, labels={"role": "reward"})
    return config, nodes


async def start_scorers(config: Config, nodes: list[Any]) -> Scorers:
    """Both serve, each on its node."""
    placement = place(plan(config, {"reward": 2}), config.placement, print)

    def make(index: int) -> Any:
        return Scorer.options(**placement.options("reward", index)).remote()  # type: ignore[attr-defined]

    handles = [make(0), make(1)]
    members = [Member(index=i, handle=each, where=await each.ready.remote()) for i, each in enumerate(handles)]
    told: list[str] = []
    roster = ScorerRoster(config, members, Incidents(told.append), make, bundles=placement)
    found = Scorers(roster, ScorerPool(config, roster), placement, nodes, told)
    assert {await found.pool.score("a"), *await found.score(2)} == {node.node_id for node in nodes}
    return found


@contextmanager
def ended(scorers: Scorers) -> Iterator[Scorers]:
    """Ends them in any case."""
    try:
        yield scorers
    finally:
        scorers.roster.stop()
        scorers.placement.release()
