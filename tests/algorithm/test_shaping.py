"""The penalty for length against values computed by hand."""

import numpy as np
import pytest

from medtvt_rl.algorithm.shaping import overlong_penalty


def test_overlong_by_hand():
    # Limit 20, buffer 8: 0 up to 12, then -(length - 12) / 8, -1 from 20 on.
    found = overlong_penalty([0, 11, 12, 13, 16, 19, 20, 21], max_new_tokens=20, buffer_tokens=8)
    np.testing.assert_allclose(found, [0, 0, 0, -1 / 8, -0.5, -7 / 8, -1, -1], atol=1e-7)
    assert found.dtype == np.float32
    assert not np.signbit(found[:3]).any()


def test_a_buffer_of_one_token_punishes_only_what_was_cut():
    assert overlong_penalty([8, 9, 10], max_new_tokens=10, buffer_tokens=1).tolist() == [0, 0, -1]


def test_the_largest_buffer_spares_one_token():
    assert overlong_penalty([0, 1, 3, 5], max_new_tokens=5, buffer_tokens=4).tolist() == [0, 0, -0.5, -1]


def test_no_completions():
    assert overlong_penalty([], max_new_tokens=10, buffer_tokens=2).shape == (0,)


@pytest.mark.parametrize("buffer", [0, -1, 10, 11])
def test_a_buffer_outside_the_limit_is_refused(buffer):
    with pytest.raises(ValueError, match=f"buffer_tokens: {buffer}, expected .* max_new_tokens, 10"):
        overlong_penalty([1], max_new_tokens=10, buffer_tokens=buffer)


@pytest.mark.parametrize("lengths", [3, [[1, 2]], [4, -1]])
def test_lengths_must_be_a_vector_of_counts(lengths):
    with pytest.raises(ValueError, match=r"lengths: .*expected \(G,\)"):
        overlong_penalty(lengths, max_new_tokens=10, buffer_tokens=2)
