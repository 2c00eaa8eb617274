"""What ZeRO-3 gathers and sends, on two real ranks, against one process that holds everything."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import packed, tri_modal

from medtvt_rl.learner.export import exported_parameters
from medtvt_rl.rollout.config import Sent

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "zero3_rank.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, output):
        assert process.returncode == 0, text[-3000:]
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
