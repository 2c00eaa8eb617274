"""A group in parts: how its completions are spread over engines, and how the parts become one group again.

Owns: these two pure functions. Does not own: which engine makes which part (actors/rollout_pool.py). A completion's
seed depends on its index in the whole group, so that splitting changes no text beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from medtvt_rl.types import RolloutGroup


def split_group(num_completions: int, share: int | None, num_engines: int) -> list[range]:
    """Completion indices of each part, nearly equal: as many parts as shares are needed, and no more than engines.

    Args:
        share: completions that one engine takes at most, while there are engines; None never splits.
    """
    wanted = 1 if share is None else -(-num_completions // share)
    count = max(1, min(wanted, num_engines))
    bounds = [num_completions * i // count for i in range(count + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


def join_group(parts: Sequence[RolloutGroup]) -> RolloutGroup:
    """The whole group, its completions in the order of the parts. Raises ValueError where they aren't of one group."""
    first = parts[0]
    completions = tuple(completion for part in parts for completion in part.completions)
    found = [completion.completion_id for completion in completions]
    expected = [f"{first.group_id}/{index}" for index in range(len(completions))]
    if found != expected:
        raise ValueError(f"parts of group {first.group_id}: completions {found}, expected {expected}")
    return RolloutGroup(group_id=first.group_id, prompt=first.prompt, completions=completions)
