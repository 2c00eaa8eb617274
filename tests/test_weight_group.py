"""Weights in two pieces, header and bytes, and the ranks of those who send the bytes to each other."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from medtvt_rl.weight_group import WeightGroup, rank_offsets
from medtvt_rl.weights import LowRank, WeightBuffer, WeightBufferError, pack_weights


def packed() -> WeightBuffer:
    """Odd sizes, several types, a scalar, an adapter."""
    torch.manual_seed(0)
    adapter = LowRank(down=torch.randn(2, 7), up=torch.randn(5, 2), scale=2.5, dtype=torch.bfloat16)
    whole = {"a": torch.randn(3, 5), "b": torch.randn(33).bfloat16(), "n": torch.tensor(9)}
    return pack_weights(4, [*whole.items(), ("c", adapter)])


def test_header_and_bytes_are_bitwise_the_buffer() -> None:
    buffer = packed()
    header = pickle.loads(pickle.dumps(buffer.header()))
    assert header.is_header and not buffer.is_header
    assert header.num_bytes == buffer.num_bytes == buffer.data.nbytes
    again = header.with_data(np.frombuffer(buffer.data.tobytes(), dtype=np.uint8))
    assert again.verify() == buffer.checksum and again.version == 4
    assert again.data.tobytes() == buffer.data.tobytes()
    assert (again.index, again.adapters) == (buffer.index, buffer.adapters)
    assert [name for name, _ in again.tensors()] == ["a", "b", "n"]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(again.tensors(), buffer.tensors()))
    (_, found), (_, sent) = next(again.low_ranks()), next(buffer.low_ranks())
    assert torch.equal(found.down, sent.down) and torch.equal(found.up, sent.up) and found.scale == 2.5


def test_other_bytes_and_another_number_of_them_are_refused() -> None:
    buffer = packed()
    data = buffer.data.copy()
    data[3] ^= 1
    with pytest.raises(WeightBufferError, match="weights of version 4: checksum"):
        buffer.header().with_data(data).verify()
    with pytest.raises(WeightBufferError, match=f"{data.nbytes - 1} bytes, indexed {data.nbytes}"):
        buffer.header().with_data(data[:-1])


def test_nothing_packed_is_whole_without_data() -> None:
    assert not pack_weights(0, []).header().is_header


@pytest.mark.parametrize(
    ("sizes", "offsets"), [([], []), ([1], [1]), ([1, 1, 1], [1, 2, 3]), ([2, 2], [1, 3]), ([2, 1, 4, 1], [1, 3, 4, 8])]
)
def test_every_worker_has_a_rank_of_its_own(sizes: list[int], offsets: list[int]) -> None:
    assert rank_offsets(sizes) == offsets
    ranks = [offset + worker for offset, size in zip(offsets, sizes) for worker in range(size)]
    assert ranks == list(range(1, 1 + sum(sizes))), "rank 0 is the learner's"


def test_the_group_says_where_to_meet() -> None:
    told = WeightGroup(address="10.0.0.7", port=4711, world_size=5).init_info(3)
    assert told == {"master_address": "10.0.0.7", "master_port": 4711, "rank_offset": 3, "world_size": 5}
