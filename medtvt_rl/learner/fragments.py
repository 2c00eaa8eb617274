"""Which elements of which parameter this rank holds in full precision, under each ZeRO stage (arXiv 1910.02054).

Owns: the way through DeepSpeed's partitions to named pieces of weights and optimizer state, and back. Does not own:
what becomes of the pieces (training_state.py), or DeepSpeed's set-up (deepspeed_engine.py).

    stage 0     every rank holds every parameter, the optimizer works on the parameters themselves
    stage 1, 2  parameters lie one behind the other in a flat buffer, of which each rank's optimizer holds one stretch
    stage 3     each parameter is cut into equal parts, one a rank; the last may reach beyond its end
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT, STEP = "weight", "step"

Read = Callable[[str, str, int, int], Tensor]
"""From (kind, name of the parameter, first element, number of elements) to values, 1-D float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Consecutive elements of one parameter, in the tensor that the optimizer works on.

    Attributes:
        name: of the parameter in the policy.
        shape: of the whole parameter.
        start: the first element, of the parameter laid flat.
        numel: how many there are.
        held: the optimizer's tensor, which may hold more.
        offset: where they begin in `held`, laid flat.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    held: Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    def values(self) -> dict[str, Tensor]:
        """[numel] views by kind: the weight, and each moment once there are some."""
        state = self.optimizer.state.get(self.held, {})
        moments = {kind: value for kind, value in state.items() if kind != STEP and torch.is_tensor(value)}
        return {kind: self._part(value) for kind, value in {WEIGHT: self.held.data, **moments}.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps that its moments have seen."""
        return int(self.optimizer.state.get(self.held, {}).get(STEP, 0))

    def restore(self, read: Read, moments: tuple[str, ...], steps: int) -> None:
        """Takes weight and moments over, as after so many optimizer steps."""
        self._part(self.held.data).copy_(read(WEIGHT, self.name, self.start, self.numel))
        if steps == 0:
            return
        state = self.optimizer.state[self.held]
        state[STEP] = torch.tensor(float(steps), dtype=torch.float32)
        for kind in moments:
            if kind not in state:
                state[kind] = torch.zeros_like(self.held.data)
            self._part(state[kind]).copy_(read(kind, self.name, self.start, self.numel))

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1).narrow(0, self.offset, self.numel)


def held_fragments(optimizer: Any, policy: nn.Module, stage: int, rank: int) -> list[Fragment]:
    """What this rank's optimizer holds of the parameters that train.

    Args:
        optimizer: DeepSpeed's, or the plain one at stage 0.
    """
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if stage == 0:
        return [
            Fragment(name=name, shape=tuple(p.shape), start=0, numel=p.numel(), held=p, offset=0, optimizer=optimizer)
            for name, p in trained
        ]
    parts = _parts_of_parameters if stage == 3 else _parts_of_the_flat_buffer
    return list(parts(optimizer, trained, rank))


def _parts_of_the_flat_buffer(zero: Any, trained: list[tuple[str, Any]], rank: int) -> Iterator[Fragment]:
    for name, parameter in trained:
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # all of it lies with other ranks
        yield Fragment(
            name=name,
            shape=tuple(parameter.shape),
            start=mapping.lp_fragment_address.start,
            numel=mapping.lp_fragment_address.numel,
            held=zero.single_partition_of_fp32_groups[mapping.param_group_index],
            offset=mapping.hp_fragment_address.start,
            optimizer=zero.optimizer,
        )


def _parts_of_parameters(zero: Any, trained: list[tuple[str, Any]], rank: int) -> Iterator[Fragment]:
    for name, parameter in trained:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = rank * size
        numel = min(size, parameter.ds_numel - start)
        if numel <= 0:
            continue
        yield Fragment(
            name=name,
            shape=tuple(parameter.ds_shape),
            start=start,
            numel=numel,
            held=zero.fp32_partitioned_groups_flat[group],
            offset=offset,
            optimizer=zero.optimizer,
        )


def restore_policy(optimizer: Any, policy: nn.Module, stage: int, read: Read) -> None:
    """Makes the policy that computes equal to the restored full-precision weights (all ranks)."""
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    parameter.view(-1).copy_(read(WEIGHT, name, 0, parameter.numel()))
