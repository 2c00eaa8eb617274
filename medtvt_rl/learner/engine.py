"""What the learner needs of a training engine, whatever drives the ranks.

Owns: the Protocol, what an engine is told, and the outcome of a step. Does not own: any implementation
(deepspeed_engine.py), or the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from medtvt_rl.learner.scoring import TokenBatch
from medtvt_rl.learner.training_state import TrainingState


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How the engine trains.

    Attributes:
        zero_stage: 0 to 3; bfloat16 runs stages 0 and 1 as 2, which accumulates gradients in float32.
        weight_decay: on matrices only.
        gradient_clipping: largest norm of the summed gradient; 0 leaves it alone.
    """

    zero_stage: int
    dtype: torch.dtype = torch.float32
    gradient_clipping: float = 1.0
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage: got {self.zero_stage}, expected 0, 1, 2 or 3")

    @property
    def effective_stage(self) -> int:
        """The ZeRO stage that runs."""
        return max(self.zero_stage, 2) if self.dtype == torch.bfloat16 else self.zero_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        grad_norm: of the summed gradient before clipping; not finite where the step was skipped for it.
        skipped: why no weight changed; None where the step was taken.
    """

    grad_norm: float
    learning_rate: float
    skipped: str | None = None


class TrainingEngine(Protocol):
    """Holds the policy and its optimizer, one rank of `world_size`. Calls marked "all ranks" are collective.

    Gradients are SUMS over ranks and micro-batches: a loss comes in divided by its global denominator.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    policy: nn.Module
    shards_parameters: bool
    """Whether a rank holds a part of each parameter only, so that the policy runs through `forward` alone."""

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs [N], differentiable where gradients are on, and entropies [N]."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of a micro-batch (all ranks, equally often); `last` closes the step's accumulation."""

    def step(self, learning_rate: float) -> StepOutcome:
        """Clips and applies the gradient (all ranks). A loss or norm that is not finite changes no weight on any
        rank.
        """

    def all_reduce(self, values: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Elementwise over ranks (all ranks)."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it every rank sees whole parameters (all ranks)."""

    def state(self, copy: bool) -> TrainingState:
        """This rank's part of weights and optimizer, and its random state: a copy, or the live tensors."""

    def load(self, folder: Path) -> None:
        """Restores what the ranks of a gang wrote of their states (all ranks)."""
