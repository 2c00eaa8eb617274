"""Weights that lie on one node alone, which dies before or while the engines fetch them. A real cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray.cluster_utils import Cluster

from actors.member import Member
from actors.process import Whereabouts, whereabouts
from actors.rollout_pool import RolloutPool
from actors.supervision import Incidents
from medtvt_rl.config import Config, RunConfig

pytestmark = pytest.mark.cluster
NUM_BYTES = 1 << 20


@ray.remote(num_cpus=0, resources={"learner": 1})  # type: ignore[call-overload]
class Learner:
    """Its weights are too large to travel with the answer."""

    @ray.method(num_returns=2)
    def export(self) -> tuple[int, NDArray[np.uint8]]:
        return 0, np.zeros(NUM_BYTES, dtype=np.uint8)


@ray.remote(num_cpus=0, resources={"engine": 1}, max_concurrency=100)  # type: ignore[call-overload]
class Engine:
    """Its checksum of weights is their size."""

    async def start(self) -> Whereabouts:
        return whereabouts()

    async def health(self) -> dict[str, Any]:
        return {"ok": True, "broken": None}

    async def update_weights(self, weights: NDArray[np.uint8], version: int) -> int:
        return weights.nbytes

    async def stats(self) -> dict[str, float]:
        return {}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    settings = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "resources": {"engine": 4}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": settings})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_an_engine_and_a_successor_whose_weights_went_down_with_their_node_load_another_export(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20, resources={"learner": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    config = Config(run=RunConfig(name="r", root=str(tmp_path)))

    async def run() -> None:
        learner, engines = Learner.remote(), [Engine.remote(), Engine.remote()]  # type: ignore[attr-defined]
        members = [Member(index=i, handle=each, where=await each.start.remote()) for i, each in enumerate(engines)]
        told: list[str] = []
        pool = RolloutPool(config, members, Incidents(told.append), lambda index: Engine.remote())  # type: ignore[attr-defined]
        exported: list[ray.ObjectRef] = []

        async def export_again() -> tuple[ray.ObjectRef, int, int]:
            exported.append(ray.put(np.zeros(NUM_BYTES, dtype=np.uint8)))
            return exported[-1], 1, NUM_BYTES

        pool.ask_learner(export_again)
        (early, first), (late, second) = learner.export.remote(), learner.export.remote()
        await asyncio.gather(early, late)
        cluster.remove_node(node, allow_graceful=False)
        await pool.update_weights(first, 1, NUM_BYTES)
        assert len(exported) == 1 and pool.num_left == 2 and len(told) == 1, told
        publication = pool._roster.publication
        assert publication is not None and publication.weights is exported[0]
        publication = pool._roster.publication = type(publication)(weights=second, version=1, checksum=NUM_BYTES)
        ray.kill(engines[0])
        await pool.stats()
        while pool.num_left < 2:
            await asyncio.sleep(0.1)
        assert len(exported) == 2 and told[-1] == "rollout 0 serves again, from version 1 on", told
        pool.stop()

    asyncio.run(asyncio.wait_for(run(), 120))
