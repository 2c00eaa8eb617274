"""One rank under ZeRO-3 with adapters, run as a process: `python zero3_rank.py RANK WORLD_SIZE PORT FOLDER`.

Exports the policy in every way and notes which parameters were gathered for it; rank 0 writes results.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from test_export import tri_modal
from torch import nn

from medtvt_rl.learner import process_group
from medtvt_rl.learner.export import export_weights
from medtvt_rl.rollout.config import Sent


class Watched:
    """The engine, and how many parameters each call gathered."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.num_gathered = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        asked = list(parameters)
        assert all(parameter.numel() == 0 for parameter in asked), "sharded"
        self.num_gathered = len(asked)
        with self._engine.gathered(asked):
            yield


def main() -> None:
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    process_group.prepare_environment(num_threads=1)
    meeting = process_group.Rendezvous(rank=rank, world_size=world_size, address="127.0.0.1", port=port, timeout_s=60)
    device = process_group.join(meeting)
    from medtvt_rl.learner.deepspeed_engine import DeepSpeedEngine, EngineSettings

    results: dict[str, Any] = {}
    for train_embeddings in (False, True):
        policy = tri_modal(train_embeddings)
        engine: Any = Watched(DeepSpeedEngine(policy, EngineSettings(zero_stage=3), device))
        ways: tuple[Sent, ...] = ("trainable", "merged", "full") if train_embeddings else ("adapter",)
        for send in ways:
            buffer = export_weights(engine, 5, send)
            assert (buffer is None) is (rank != 0)
            results[send] = (engine.num_gathered, buffer)
    assert set(results) == set(get_args(Sent))
    if rank == 0:
        torch.save(results, folder / "results.pt")
    process_group.leave()


if __name__ == "__main__":
    main()
