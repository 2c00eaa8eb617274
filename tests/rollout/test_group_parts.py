"""A group in parts: sizes, and the order of what is put together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtvt_rl.rollout.parts import join_group, split_group
from medtvt_rl.types import Completion, GroupHeader, Prompt, RolloutGroup

PROMPT = Prompt(prompt_id="p", token_ids=np.arange(3, dtype=np.int32), item_id=None, ground_truth="")


def part(group_id: int, indices: range) -> RolloutGroup:
    """Completion i has i + 1 tokens, all of version 10 + i; odd ones were cut."""
    completions = tuple(
        Completion(
            completion_id=f"{group_id}/{i}",
            token_ids=np.full(i + 1, i, dtype=np.int32),
            behaviour_logprobs=np.zeros(i + 1, dtype=np.float32),
            policy_versions=np.full(i + 1, 10 + i, dtype=np.int32),
            finish_reason="length" if i % 2 else "stop",
        )
        for i in indices
    )
    return RolloutGroup(group_id=group_id, prompt=PROMPT, completions=completions)


@given(st.integers(1, 200), st.none() | st.integers(1, 50), st.integers(0, 9))
def test_parts_cover_the_group_once_in_order_and_nearly_equal(count: int, share: int | None, engines: int) -> None:
    parts = split_group(count, share, engines)
    assert [i for indices in parts for i in indices] == list(range(count))
    sizes = [len(indices) for indices in parts]
    assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1
    assert len(parts) == 1 or len(parts) <= engines
    assert share is not None or len(parts) == 1
    if share is not None and share * engines >= count:
        assert max(sizes) <= share


def test_parts_become_the_group_and_its_header_is_of_the_whole() -> None:
    whole = join_group([part(4, range(3)), part(4, range(3, 8))])
    assert [c.completion_id for c in whole.completions] == [f"4/{i}" for i in range(8)]
    header = GroupHeader.of(whole, 2.5)
    assert header.lengths == tuple(range(1, 9)) and header.num_cut == 4
    assert (header.oldest_version, header.newest_version, header.generate_s) == (10, 17, 2.5)


@pytest.mark.parametrize("parts", [(range(3), range(4, 8)), (range(3, 8), range(3)), (range(3), range(2, 8))])
def test_parts_that_do_not_fit_together_are_refused(parts: tuple[range, range]) -> None:
    with pytest.raises(ValueError, match="parts of group 4"):
        join_group([part(4, indices) for indices in parts])
