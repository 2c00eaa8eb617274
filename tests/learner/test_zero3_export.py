"""What ZeRO-3 gathers and sends, on two real ranks, against one process that holds everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_export import packed, tri_modal
from two_ranks import run_two_ranks

from medtvt_rl.learner.export import exported_parameters
from medtvt_rl.rollout.config import Sent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks("zero3_rank.py", folder)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("send", ["adapter", "trainable", "merged", "full"])
def test_a_sharded_policy_sends_what_a_whole_one_does(results: dict[str, Any], send: Sent) -> None:
    policy = tri_modal(train_embeddings=send != "adapter")
    expected, (num_gathered, found) = packed(policy, send), results[send]
    assert found.index == expected.index and found.adapters == expected.adapters
    assert found.checksum == expected.checksum
    assert num_gathered == len(exported_parameters(policy, send))


def test_unmerged_adapters_need_no_frozen_weight(results: dict[str, Any]) -> None:
    gathered = {send: count for send, (count, _) in results.items()}
    assert gathered["adapter"] < gathered["trainable"] < gathered["merged"] < gathered["full"]
