"""Micro-batches and shards: complete, within the budget, deterministic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.algorithm.packing import balanced_shards, micro_batches

LENGTHS = st.lists(st.integers(1, 100), max_size=40)


def test_by_hand():
    assert micro_batches([5, 10, 3, 9, 1], token_budget=20) == [[1, 3], [0, 2, 4]]
    assert micro_batches([], token_budget=20) == []


@settings(deadline=None)
@given(LENGTHS, st.integers(100, 400))
def test_every_sequence_once_and_within_the_budget(lengths, budget):
    batches = micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    assert batches == micro_batches(list(lengths), budget)


def test_sequence_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"token_budget: 8, but sequence 1 has 9 tokens"):
        micro_batches([3, 9], token_budget=8)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_shards_are_complete_and_balanced(lengths, num_ranks):
    shards = balanced_shards(lengths, num_ranks)
    assert len(shards) == num_ranks
    assert sorted(index for shard in shards for index in shard) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    if len(lengths) >= num_ranks:
        assert all(shards)


def test_shards_by_hand():
    assert balanced_shards([8, 7, 6, 5, 4], 2) == [[0, 3, 4], [1, 2]]  # 8 + 5 and 7 + 6, the tie goes to rank 0


def test_rejects_nonsense():
    with pytest.raises(ValueError, match="num_ranks"):
        balanced_shards([1], 0)
    with pytest.raises(ValueError, match=r"lengths\[1\]"):
        micro_batches([1, 0], 10)
