"""No prompt is skipped or repeated, whatever the resumes."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.types import Prompt


def prompts(count: int) -> list[Prompt]:
    ids = np.array([1], dtype=np.int32)
    return [Prompt(prompt_id=str(i), token_ids=ids, item_id=None, ground_truth="") for i in range(count)]


def draw(sampler: PromptSampler, count: int) -> list[tuple[int, int]]:
    drawn = [sampler.next() for _ in range(count)]
    assert all(prompt.prompt_id == str(index) for _, index, prompt in drawn)
    return [(epoch, index) for epoch, index, _ in drawn]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31), st.lists(st.integers(0, 15), max_size=6))
def test_resumes_change_nothing(count: int, seed: int, stops: list[int]) -> None:
    straight = draw(PromptSampler(prompts(count), seed), sum(stops) + 3 * count)
    sampler, resumed = PromptSampler(prompts(count), seed), []
    for stop in stops:
        resumed += draw(sampler, stop)
        state = json.loads(json.dumps(sampler.state_dict()))
        sampler = PromptSampler(prompts(count), seed)
        sampler.load_state_dict(state)
    resumed += draw(sampler, 3 * count)
    assert resumed == straight
    for epoch in range(len(straight) // count):
        part = straight[epoch * count : (epoch + 1) * count]
        assert Counter(part) == Counter((epoch, index) for index in range(count))


def test_order_differs_between_epochs_and_seeds() -> None:
    drawn = [index for _, index in draw(PromptSampler(prompts(20), 0), 40)]
    other = [index for _, index in draw(PromptSampler(prompts(20), 1), 20)]
    assert drawn[:20] != drawn[20:] and drawn[:20] != other


def test_a_state_of_other_data_is_refused() -> None:
    state = PromptSampler(prompts(4), 0).state_dict()
    with pytest.raises(ValueError, match="num_prompts is 4 in the checkpoint and 5 now"):
        PromptSampler(prompts(5), 0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 0 in the checkpoint and 1 now"):
        PromptSampler(prompts(4), 1).load_state_dict(state)
    with pytest.raises(ValueError, match="damaged"):
        PromptSampler(prompts(4), 0).load_state_dict({**state, "position": 9})
    with pytest.raises(ValueError, match="prompts: 0 given"):
        PromptSampler([], 0)
