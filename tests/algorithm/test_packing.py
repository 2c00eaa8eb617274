"""Micro-batches and shards: complete, within the budget, deterministic, prompts shared."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.algorithm.packing import COPIED_TOKENS, TOLERANCE, Extent, balanced_shards, micro_batches

GROUPS = st.lists(st.tuples(st.integers(1, 50), st.lists(st.integers(0, 50), max_size=12)), max_size=8)
LENGTHS = st.lists(st.lists(st.integers(1, 100), max_size=12), max_size=10)


def extents(*groups):
    """Of groups (prompt tokens, tokens of each completion), one after the other."""
    return [
        Extent(prompt=place, prompt_tokens=prompt_tokens, completion_tokens=length)
        for place, (prompt_tokens, lengths) in enumerate(groups)
        for length in lengths
    ]


def rows(*lengths):
    return extents(*((length, [0]) for length in lengths))


def cost(members):
    prompts = {extent.prompt for extent in members}
    width = max(extent.prompt_tokens for extent in members)
    computed = len(prompts) * width + len(members) * max(extent.completion_tokens for extent in members)
    return computed + (len(members) - len(prompts)) * width / COPIED_TOKENS


def test_by_hand():
    assert micro_batches(rows(5, 10, 3, 9, 1), token_budget=20) == [[1, 3], [0, 2, 4]]
    assert micro_batches([], token_budget=20) == []
    # One prompt of 16 and three completions of 8: 16 + 3 * 8 and two copies of 16, which count as 2 tokens each.
    assert micro_batches(extents((16, [8, 8, 8])), token_budget=44) == [[0, 1, 2]]
    assert micro_batches(extents((16, [8, 8, 8])), token_budget=43) == [[0, 1], [2]]


def test_group_mates_stay_together_longest_first():
    plan = micro_batches(extents((8, [4, 2]), (9, [3, 4]), (8, [4, 4])), token_budget=20)
    assert plan == [[3, 2], [0, 1], [4, 5]]


def test_a_prompt_met_twice_is_shared():
    two = extents((10, [5]), (10, [5]))
    one = [Extent(prompt="p", prompt_tokens=10, completion_tokens=5)] * 2
    assert micro_batches(two, token_budget=25) == [[0], [1]]
    assert micro_batches(one, token_budget=25) == [[0, 1]]


def test_long_completions_part_from_short_ones_where_padding_costs_more_than_a_prompt():
    lengths = [100, 1, 1, 1, 1, 1]
    plan = micro_batches(extents((2, lengths), (2, lengths)), token_budget=210)
    assert sorted(map(sorted, plan)) == [[0, 6], [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]]


@settings(deadline=None)
@given(GROUPS, st.integers(100, 400))
def test_every_sequence_once_and_within_the_budget(groups, budget):
    sequences = extents(*groups)
    batches = micro_batches(sequences, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences)))
    for batch in batches:
        assert cost([sequences[i] for i in batch]) <= budget
    assert batches == micro_batches(list(sequences), budget)


@pytest.mark.parametrize(("group_size", "count"), [(8, 25), (256, 27)])
def test_a_micro_batch_holds_nearly_as_much_of_small_groups_as_of_a_large_one(group_size, count):
    plan = micro_batches(extents(*[(64, [64] * group_size)] * (256 // group_size)), token_budget=2048)
    assert max(map(len, plan)) == count


def test_sequence_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"token_budget: 8, but sequence 1 has 9 tokens"):
        micro_batches(extents((3, [0]), (4, [5])), token_budget=8)


def loads(groups, shards):
    return [sum(groups[g][index] for g, index in shard) for shard in shards]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_shards_are_complete_and_balanced(groups, num_ranks):
    shards = balanced_shards(groups, num_ranks)
    assert len(shards) == num_ranks
    places = [(g, index) for g, lengths in enumerate(groups) for index in range(len(lengths))]
    assert sorted(place for shard in shards for place in shard) == places
    assert all(shard == sorted(shard) for shard in shards)
    if len(places) >= num_ranks:
        assert all(shards)
    total, longest = sum(map(sum, groups)), max((length for lengths in groups for length in lengths), default=0)
    mean = total / num_ranks
    assert max(loads(groups, shards)) <= mean + max(longest, TOLERANCE * mean) + 1e-6


def cut_groups(shards):
    owners = [{g for g, _ in shard} for shard in shards]
    return sum(len(owner) for owner in owners) - len(set().union(*owners))


def test_groups_stay_whole_where_the_balance_allows():
    groups = [[50 + (7 * g + 3 * i) % 11 for i in range(8)] for g in range(16)]
    for num_ranks in (2, 4, 8):
        shards = balanced_shards(groups, num_ranks)
        assert cut_groups(shards) == 0
        assert max(loads(groups, shards)) <= (1 + TOLERANCE) * sum(map(sum, groups)) / num_ranks


def test_no_more_groups_are_cut_than_there_are_borders():
    groups = [[50 + (7 * g + 3 * i) % 11 for i in range(8)] for g in range(5)]
    for num_ranks in (2, 3, 4):
        shards = balanced_shards(groups, num_ranks)
        assert cut_groups(shards) <= num_ranks - 1
        assert max(loads(groups, shards)) <= (1 + TOLERANCE) * sum(map(sum, groups)) / num_ranks
    one = balanced_shards([[10] * 256], 3)
    assert [len(shard) for shard in one] == [85, 86, 85]


def test_shards_by_hand():
    # The largest group left to the least loaded rank: 9 + 5 and 7 + 6.
    assert balanced_shards([[9], [7], [4, 2], [5]], 2) == [[(0, 0), (3, 0)], [(1, 0), (2, 0), (2, 1)]]
    # That would be 8 + 5 + 4 and 7 + 6, a seventh above the mean: cut in the middle of the row in its stead.
    assert balanced_shards([[8], [7], [6], [5], [4]], 2) == [[(0, 0), (1, 0)], [(2, 0), (3, 0), (4, 0)]]
    assert balanced_shards([[4, 4], [4, 4], [4, 4]], 2) == [[(0, 0), (0, 1), (1, 0)], [(1, 1), (2, 0), (2, 1)]]
    assert balanced_shards([[1, 100]], 2) == [[(0, 0)], [(0, 1)]]
    assert balanced_shards([[5]], 3) == [[(0, 0)], [], []]


def test_rejects_nonsense():
    with pytest.raises(ValueError, match="num_ranks"):
        balanced_shards([[1]], 0)
    with pytest.raises(ValueError, match=r"groups\[0\]\[1\]: 0"):
        balanced_shards([[1, 0]], 1)
    with pytest.raises(ValueError, match=r"extents\[1\].prompt_tokens: 0"):
        micro_batches(rows(1, 0), 10)
