"""A node that dies takes its actor with it; the actor comes back on the next node that joins. A real cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.member import Member
from actors.placement import place, plan
from actors.process import Whereabouts, whereabouts
from actors.scoring_pools import ScorerPool, ScorerRoster
from actors.supervision import Incidents
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.roles import RoleResources

pytestmark = pytest.mark.cluster
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


async def until(condition: Callable[[], bool], what: Any) -> None:
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(what)


def test_an_actor_comes_back_on_the_next_node_that_joins(cluster: Cluster, tmp_path: Path) -> None:
    nodes = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    ray.init(address=cluster.address, log_to_driver=False)
    config = Config(run=RunConfig(name="r", root=str(tmp_path)), num_scorers=2, score_timeout_s=60.0)
    config.placement.reward = RoleResources(cpus=1, labels={"role": "reward"})

    async def run() -> None:
        told: list[str] = []
        placement = place(plan(config, {"reward": 2}), 60)

        def make(index: int) -> Any:
            return Scorer.options(**placement.options("reward", index)).remote()  # type: ignore[attr-defined]

        handles = [make(0), make(1)]
        members = [Member(index=i, handle=each, where=await each.ready.remote()) for i, each in enumerate(handles)]
        roster = ScorerRoster(config, members, Incidents(told.append), make, bundles=placement)
        roster.keep_watch()
        pool: Any = ScorerPool(config, roster)
        assert {await pool.score("a"), *await asyncio.gather(pool.score("b"), pool.score("c"))} == {
            node.node_id for node in nodes
        }
        cluster.remove_node(nodes[1], allow_graceful=False)
        assert len(await asyncio.gather(*(pool.score(f"{i}") for i in range(20)))) == 20, "no group is lost on the way"
        await until(lambda: any("no node has room for reward" in line for line in told), told)
        found = await asyncio.gather(*(pool.score(f"{i}") for i in range(20)))
        assert set(found) == {nodes[0].node_id}, "the run goes on with what is left"
        new = cluster.add_node(**NODE)
        await until(lambda: len(roster.serving) == 2, told)
        assert new.node_id in await asyncio.gather(pool.score("d"), pool.score("e"))
        assert told[-1].endswith("serves again")
        roster.stop()
        placement.release()

    asyncio.run(run())
