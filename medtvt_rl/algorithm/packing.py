"""Which sequences go together: into the ranks of a step, and into the micro-batches of a rank.

Owns: the assignment, from lengths alone, the same on every rank. Does not own: padding itself, or the tensors.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cuts sequences into micro-batches whose padded size (count times longest) is at most `token_budget`.

    Longest first: that gives the fewest micro-batches for sequences sorted by length, and a budget too large for
    the memory shows at the first one. Ties go by index, so the result is a function of the lengths.

    Args:
        lengths: tokens of each sequence (prompt and completion), 1 or more.
        token_budget: padded tokens of one micro-batch.

    Returns:
        Indices into `lengths`, each exactly once.

    Raises:
        ValueError: a sequence longer than the budget, or a length below 1.
    """
    _check_lengths(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > token_budget:
        raise ValueError(
            f"learner.token_budget: {token_budget}, but sequence {order[0]} has {lengths[order[0]]} tokens; "
            "raise the budget, or lower rollout.sampling.max_new_tokens"
        )
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def balanced_shards(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Cuts sequences into one shard a rank with nearly equal tokens: the longest left goes to the least loaded rank.

    Returns:
        `num_ranks` lists of indices, each index exactly once, ascending within a shard. No shard is empty where there
        are at least as many sequences as ranks.

    Raises:
        ValueError: fewer than one rank, or a length below 1.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: {num_ranks}, expected 1 or more")
    _check_lengths(lengths)
    shards: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0, 0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, rank = heapq.heappop(load)
        shards[rank].append(index)
        heapq.heappush(load, (tokens + lengths[index], count + 1, rank))
    return [sorted(shard) for shard in shards]


def _check_lengths(lengths: Sequence[int]) -> None:
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{index}]: {length}, expected 1 token or more (prompt and completion together)")
