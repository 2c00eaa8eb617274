"""The training engine over DeepSpeed, ZeRO stages 0 to 3 (arXiv 1910.02054), on CPUs (gloo) or GPUs (NCCL).

Owns: DeepSpeed's settings, gradient scaling, the guard against steps that are not finite.
Does not own: the process group (process_group.py: `prepare_environment` and `join` come first), the loss, the schedule,
the form of its state in files (training_state.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medtvt_rl.learner.engine import EngineSettings, StepOutcome
from medtvt_rl.learner.fragments import Fragment, held_fragments, restore_policy
from medtvt_rl.learner.scoring import ScoringModule, TokenBatch
from medtvt_rl.learner.training_state import StateReader, TrainingState

NEVER = 10**9


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer: decay on matrices, none on vectors and scalars."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("policy: no parameter requires a gradient; unfreeze some before training")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": settings.effective_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5_000_000,
        "allgather_bucket_size": 5_000_000,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.gradient_clipping,
        "steps_per_print": NEVER,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class DeepSpeedEngine:
    """A TrainingEngine of one rank; the process group must be up."""

    def __init__(self, policy: nn.Module, settings: EngineSettings, device: torch.device) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Compiling the shared-memory all-reduce takes over a minute and leaks /dev/shm at every start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed, self._settings = deepspeed, settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device, self.dtype, self.policy = device, settings.dtype, policy
        self.shards_parameters = settings.effective_stage == 3
        module = ScoringModule(policy.to(device))
        optimizer = torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay), lr=0.0, betas=settings.adam_betas, eps=1e-8
        )
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_deepspeed_config(settings), dist_init_required=False
        )
        if self.shards_parameters:
            # The output embedding is used outside the module that holds it.
            output_weight: Any = policy.output_weight
            deepspeed.zero.register_external_parameter(module, output_weight)
        self._finite_losses = True

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs [N], differentiable where gradients are on, and entropies [N]."""
        return self._engine(batch, temperature)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, already divided by its global denominator.

        DeepSpeed averages over ranks, so the loss is multiplied by their number. A loss that is not finite poisons
        the whole gradient with NaN: every rank then sees a norm that is not finite, with no collective of its own.
        """
        if not bool(torch.isfinite(loss.detach())):
            self._finite_losses = False
            loss = loss * float("nan")
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size)

    def step(self, learning_rate: float) -> StepOutcome:
        """Clips and applies the gradient; leaves every weight as it is where the gradient is not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        taken, grad_norm = self._sharded_step() if self._settings.effective_stage else self._plain_step()
        skipped = None
        if not taken:
            bad_loss = self.all_reduce(torch.tensor([float(not self._finite_losses)]), "max")
            source = "a loss" if bool(bad_loss.item()) else f"the gradient norm, {grad_norm},"
            skipped = f"{source} is not finite"
        self._finite_losses = True
        return StepOutcome(grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped)

    def _sharded_step(self) -> tuple[bool, float]:
        """ZeRO 1 to 3: DeepSpeed computes the global norm and skips the step itself where it isn't finite."""
        self._engine.step()
        return bool(self._engine.was_step_applied()), float(self._engine.get_global_grad_norm())

    def _plain_step(self) -> tuple[bool, float]:
        """ZeRO 0: gradients were all-reduced in the last backward, so that every rank decides alike."""
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        grad_norm = float(nn.utils.get_total_norm(grads))
        if not np.isfinite(grad_norm):
            self._engine.zero_grad()
            return False, grad_norm
        self._engine.step()
        return True, grad_norm

    def all_reduce(self, values: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Elementwise over ranks."""
        values = values.to(self.device)
        dist.all_reduce(values, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return values

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Whole parameters under ZeRO-3; nothing to do below it."""
        with self._deepspeed.zero.GatheredParameters(list(parameters), enabled=self.shards_parameters):
            yield

    def state(self, copy: bool) -> TrainingState:
        """What this rank keeps: its part of what trains and of the optimizer, and its random state. Frozen parameters
        stay in the model folder. No collective.
        """
        whole = self._settings.effective_stage == 0
        fragments = [] if whole and self.rank > 0 else self._fragments()
        return TrainingState.of(fragments, self._shapes(), self.world_size, copy)

    def load(self, folder: Path) -> None:
        """Restores what any gang wrote, into an engine that has not trained yet; bitwise where number of ranks and ZeRO
        stage are the same.

        Raises:
            ValueError: it is damaged, or of another model.
        """
        stage = self._settings.effective_stage
        with StateReader(folder) as reader:
            reader.check_parameters(self._shapes())
            for fragment in self._fragments():
                fragment.restore(reader.read, reader.moments, reader.steps)
            restore_policy(self._engine.optimizer, self.policy, stage, reader.read)
            reader.restore_random(self.rank)
        dist.barrier()

    def _fragments(self) -> list[Fragment]:
        return held_fragments(self._engine.optimizer, self.policy, self._settings.effective_stage, self.rank)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }
