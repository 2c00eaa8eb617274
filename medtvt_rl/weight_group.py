"""Where the learner and the workers of all engines meet to broadcast weights, and who has which rank there.

Owns: the records and the arithmetic. Does not own: communicators (model/vllm_receiver.py, learner/nccl_sender.py), or
when a group is built (actors/weight_transfer.py). Importable without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """One group: rank 0 is the learner's, each worker of each engine has another.

    Attributes:
        address, port: where rank 0 listens; a port is used once.
        world_size: ranks.
    """

    address: str
    port: int
    world_size: int

    def init_info(self, rank_offset: int) -> dict[str, str | int]:
        """What vLLM's workers of one engine are told; the rank of the first is `rank_offset`."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": rank_offset,
            "world_size": self.world_size,
        }


def rank_offsets(num_workers: Sequence[int]) -> list[int]:
    """The first rank of each engine, behind rank 0 and the engines before it.

    Args:
        num_workers: of each engine: its tensor-parallel size.
    """
    return [1 + before for before in accumulate(num_workers[:-1], initial=0)] if num_workers else []
