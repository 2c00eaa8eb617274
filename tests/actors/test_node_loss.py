"""A node that dies takes its actor with it; the actor comes back on the next node that joins. A real cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from scorer_nodes import NODE, cluster, ended, join_two_nodes, start_scorers
from waiting import until

pytestmark = pytest.mark.cluster
__all__ = ["cluster"]


def test_an_actor_comes_back_on_the_next_node_that_joins(cluster: Cluster, tmp_path: Path) -> None:
    config, nodes = join_two_nodes(cluster, tmp_path)

    async def run() -> None:
        with ended(await start_scorers(config, nodes)) as scorers:
            told, is_gone = scorers.told, scorers.placement.is_gone
            at = {member.where.node_id for member in scorers.roster.serving.values() if member.where is not None}
            assert at == {node.node_id for node in nodes} and not any(is_gone(node) for node in at)
            scorers.roster.keep_watch()
            cluster.remove_node(nodes[1], allow_graceful=False)
            assert len(await scorers.score(20)) == 20, "no group is lost on the way"
            await until(lambda: any("no node has room for reward" in line for line in told), told)
            assert is_gone(nodes[1].node_id) and not is_gone(nodes[0].node_id)
            assert set(await scorers.score(20)) == {nodes[0].node_id}, "the run goes on with what is left"
            new = cluster.add_node(**NODE)
            await until(lambda: len(scorers.roster.serving) == 2, told)
            assert new.node_id in await scorers.score(2)
            assert told[-1].endswith("serves again")

    asyncio.run(run())
