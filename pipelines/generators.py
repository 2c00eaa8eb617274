"""What a run's generators did of the whole, and who comes and goes beside the loop.

Owns: the words and the summary of shares, the tasks that add and remove generators and empty nodes. Does not own: when
that is (actors/elastic.py, actors/drain.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from actors.drain import Drain
from actors.elastic import Elastic
from actors.placement import Placement
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.rollout.balance import Share
from pipelines.beside import beside

LINES = 16


class Listening(Protocol):
    """Who can tell a step's metrics."""

    listener: Callable[[Mapping[str, float]], None]


@asynccontextmanager
async def elastic(
    config: Config, rollouts: RolloutPool, placement: Placement, steps: Listening | None, tell: Callable[[str], None]
) -> AsyncIterator[None]:
    """Within it generators come and go, where `rollout.min` and `rollout.max` leave room for it; a policy learns of
    `steps`."""
    if not Elastic.is_wanted(config):
        yield
        return
    keeper = Elastic(config, rollouts, placement, tell)
    if steps is not None:
        steps.listener = keeper.observe
    async with beside(keeper.run(), lambda why: tell(f"no more generators come or go: {why}")):
        yield


@asynccontextmanager
async def drained(
    config: Config,
    pools: Mapping[str, Any],
    placement: Placement,
    keep_soon: Callable[[], bool],
    tell: Callable[[str], None],
) -> AsyncIterator[None]:
    """Within it actors leave a node that will be taken away before it is.

    Args:
        pools: by role.
        keep_soon: asks for a checkpoint; whether there will be one.
    """
    drain = Drain(pools, placement, keep_soon, config.rollout.generate_timeout_s, tell)
    async with beside(drain.run(), lambda why: tell(f"nodes that will be taken away are not emptied any more: {why}")):
        yield


def generators_summary(shares: Sequence[Share], kinds: Mapping[int, str]) -> list[dict[str, Any]]:
    """For the summary: of each generator its number, node, groups, tokens, share of all tokens and tokens a second."""
    return [
        {
            "index": one.index,
            "node": kinds.get(one.index, "has left"),
            "groups": one.groups,
            "tokens": one.tokens,
            "share": one.share,
            "tokens_per_s": one.tokens_per_s,
        }
        for one in shares
    ]


def generators_lines(generators: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line each for the reader, where there are several."""
    if len(generators) < 2:
        return []
    lines = [
        f"rollout {one['index']} ({one['node']}): {one['share']:.0%} of the tokens, "
        + ("not measured" if one["tokens_per_s"] is None else f"{one['tokens_per_s']:.0f} tokens/s while it worked")
        for one in generators[:LINES]
    ]
    return lines + ([f"and {len(generators) - LINES} more, see summary.json"] if len(generators) > LINES else [])
