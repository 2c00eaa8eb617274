"""Which sequences go together: into the ranks of a step, and into the micro-batches of a rank.

Owns: the assignment, from lengths alone, the same on every rank, so that completions of one prompt meet where they can
share it. Does not own: padding itself, or the tensors.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

COPIED_TOKENS = 8
"""So many prompt tokens whose keys and values are copied for a completion count as one token that is computed.

A copy keeps two vectors a layer for the backward pass; a computed token of a Llama keeps 16 or more."""
TOLERANCE = 0.1
"""How far the fullest rank may lie above the mean for its groups to stay whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How long a sequence is, and with which others it shares its prompt.

    Attributes:
        prompt: equal where the prompts are the same and run once.
        prompt_tokens: 1 or more.
        completion_tokens: 0 or more.
    """

    prompt: Hashable
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _MicroBatch:
    """Sequences so far, and what the padded rectangles of prompts and of completions measure."""

    members: list[int] = field(default_factory=list)
    prompts: set[Hashable] = field(default_factory=set)
    prompt_width: int = 0
    completion_width: int = 0
    cost: float = 0.0

    def cost_with(self, extent: Extent) -> float:
        num_prompts = len(self.prompts) + (extent.prompt not in self.prompts)
        num_completions = len(self.members) + 1
        prompt_width = max(self.prompt_width, extent.prompt_tokens)
        computed = num_prompts * prompt_width + num_completions * max(self.completion_width, extent.completion_tokens)
        return computed + (num_completions - num_prompts) * prompt_width / COPIED_TOKENS

    def add(self, index: int, extent: Extent) -> None:
        self.cost = self.cost_with(extent)
        self.members.append(index)
        self.prompts.add(extent.prompt)
        self.prompt_width = max(self.prompt_width, extent.prompt_tokens)
        self.completion_width = max(self.completion_width, extent.completion_tokens)


def micro_batches(extents: Sequence[Extent], token_budget: int) -> list[list[int]]:
    """Cuts sequences into micro-batches that cost at most `token_budget` each.

    A micro-batch costs its padded tokens: unique prompts times the longest, plus completions times the longest; and, as
    COPIED_TOKENS says, the keys and values that the second and later completions of a prompt copy. So memory follows
    the budget, however large a group is. Completions of a prompt stay together, longest first, unless it costs less in
    all to part long ones from short ones. The result is a function of the extents, ties going by index.

    Returns:
        Indices into `extents`, each exactly once.

    Raises:
        ValueError: a sequence longer than the budget, or a prompt without tokens.
    """
    for index, extent in enumerate(extents):
        _check_length(f"extents[{index}].prompt_tokens", extent.prompt_tokens)
        length = extent.prompt_tokens + extent.completion_tokens
        if length > token_budget:
            raise ValueError(
                f"learner.token_budget: {token_budget}, but sequence {index} has {length} tokens; "
                "raise the budget, or lower rollout.sampling.max_new_tokens"
            )
    orders = [_order(extents, num_classes) for num_classes in (1, 2, 4, 8, len(extents))]
    plans = [_filled(extents, order, token_budget) for order in orders]
    best = min(plans, key=lambda plan: sum(batch.cost for batch in plan))
    return [batch.members for batch in best]


def _order(extents: Sequence[Extent], num_classes: int) -> list[int]:
    """Prompt by prompt, the longest first, within each of equally large classes of completion length, the longest
    first. One class shares most, many pad least.
    """
    by_completion = sorted(range(len(extents)), key=lambda i: (-extents[i].completion_tokens, i))
    length_class = {index: place * num_classes // len(extents) for place, index in enumerate(by_completion)}
    first: dict[Hashable, int] = {}
    for index, extent in enumerate(extents):
        first.setdefault(extent.prompt, index)

    def key(index: int) -> tuple[int, ...]:
        extent = extents[index]
        prompt = (-extent.prompt_tokens, first[extent.prompt])
        return (length_class[index], *prompt, -extent.completion_tokens, index)

    return sorted(range(len(extents)), key=key)


def _filled(extents: Sequence[Extent], order: Sequence[int], token_budget: int) -> list[_MicroBatch]:
    batches: list[_MicroBatch] = []
    for index in order:
        if not batches or batches[-1].cost_with(extents[index]) > token_budget:
            batches.append(_MicroBatch())
        batches[-1].add(index, extents[index])
    return batches


Place = tuple[int, int]
"""A completion: its group, and its index in the group."""


def balanced_shards(groups: Sequence[Sequence[int]], num_ranks: int) -> list[list[Place]]:
    """Cuts the completions of a batch into one shard a rank with nearly equal tokens.

    Whole groups go to ranks where that leaves the fullest within TOLERANCE of the mean, because completions of one rank
    share their prompt; otherwise, as few groups as there are borders between ranks are cut.

    Args:
        groups: tokens of each completion of each group, 1 or more.

    Returns:
        `num_ranks` lists of places, each place exactly once, ascending within a shard. No shard is empty where there
        are at least as many completions as ranks.

    Raises:
        ValueError: fewer than one rank, or a length below 1.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: {num_ranks}, expected 1 or more")
    for g, lengths in enumerate(groups):
        for index, length in enumerate(lengths):
            _check_length(f"groups[{g}][{index}]", length)
    shards = _whole_groups(groups, num_ranks)
    loads = [sum(groups[g][index] for g, index in shard) for shard in shards]
    if all(shards) and max(loads) <= (1 + TOLERANCE) * sum(loads) / num_ranks:
        return shards
    return _cut(groups, num_ranks)


def _whole_groups(groups: Sequence[Sequence[int]], num_ranks: int) -> list[list[Place]]:
    """The largest group left goes to the least loaded rank."""
    shards: list[list[Place]] = [[] for _ in range(num_ranks)]
    load = [(0, rank) for rank in range(num_ranks)]
    for g in sorted(range(len(groups)), key=lambda g: (-sum(groups[g]), g)):
        tokens, rank = heapq.heappop(load)
        shards[rank] += [(g, index) for index in range(len(groups[g]))]
        heapq.heappush(load, (tokens + sum(groups[g]), rank))
    return [sorted(shard) for shard in shards]


def _cut(groups: Sequence[Sequence[int]], num_ranks: int) -> list[list[Place]]:
    """All completions in a row, cut where the tokens before come nearest to each rank's share, or between two groups
    where that is near enough.
    """
    places = [(g, index) for g, lengths in enumerate(groups) for index in range(len(lengths))]
    before = [0]
    for g, index in places:
        before.append(before[-1] + groups[g][index])
    mean, cuts = before[-1] / num_ranks, [0]
    for rank in range(1, num_ranks):
        left = min(cuts[-1] + 1, len(places))
        right = max(left, len(places) - (num_ranks - rank))
        cuts.append(_nearest_cut(places, before, range(left, right + 1), rank * mean, mean))
    return [places[a:b] for a, b in zip(cuts, [*cuts[1:], len(places)])]


def _nearest_cut(places: list[Place], before: list[int], cuts: range, target: float, mean: float) -> int:
    def distance(cut: int) -> float:
        return abs(before[cut] - target)

    between = [cut for cut in cuts if cut < len(places) and places[cut][1] == 0]
    near = [cut for cut in between if distance(cut) <= TOLERANCE / 2 * mean]
    return min(near or cuts, key=distance)


def _check_length(name: str, length: int) -> None:
    if length < 1:
        raise ValueError(f"{name}: {length}, expected 1 token or more")
