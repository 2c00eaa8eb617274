"""Which groups made a step not finite.

Owns: the checks of a micro-batch row by row, that of a gradient, and the ranks' agreement on what was found. Does not
own: the step that is given up (grpo_learner.py, engine.py), or what becomes of the groups (pipelines/grpo_loop.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from medtvt_rl.algorithm.config import LossConfig
from medtvt_rl.algorithm.losses import Denominators, LossInputs, sequence_losses
from medtvt_rl.learner.engine import TrainingEngine

CAUSES = ("policy log-probs", "behaviour log-probs", "reference log-probs", "advantage", "loss", "gradient")
Fault = tuple[str, int]
"""What was not finite, one of CAUSES, and the id of the group."""


def row_faults(
    inputs: LossInputs, loss: Tensor, config: LossConfig, denominators: Denominators, group_ids: Sequence[int]
) -> set[Fault]:
    """What is not finite in a micro-batch, by the groups of its rows; a row without tokens adds nothing and has none.

    Args:
        loss: of the micro-batch; where it alone is not finite, its rows are computed one by one.
        group_ids: [B].
    """
    values = (inputs.policy_logprobs, inputs.behaviour_logprobs, inputs.reference_logprobs)
    bad = [~torch.isfinite(v) & inputs.mask if v is not None else torch.zeros_like(inputs.mask) for v in values]
    bad.append(~torch.isfinite(inputs.advantages)[:, None] & inputs.mask)
    table = torch.stack([rows.any(dim=1) for rows in bad]).tolist()
    found = {(cause, group_ids[row]) for cause, rows in zip(CAUSES, table) for row, flag in enumerate(rows) if flag}
    if found or bool(torch.isfinite(loss.detach())):
        return found
    losses = sequence_losses(inputs, config, denominators)
    return {("loss", group_ids[row]) for row, flag in enumerate((~torch.isfinite(losses)).tolist()) if flag}


def has_finite_gradient(loss: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the gradient of `loss` and its norm are finite; no `.grad` is written and no engine's hook runs."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
    norm = nn.utils.get_total_norm([gradient.float() for gradient in gradients if gradient is not None])
    return bool(torch.isfinite(norm))


def agree(engine: TrainingEngine, faults: Iterable[Fault]) -> list[Fault]:
    """The faults of all ranks, the same sorted list on each (all ranks)."""
    own = sorted(faults)
    count = int(engine.all_reduce(torch.tensor([len(own)], dtype=torch.int64), "max").item())
    if count == 0:
        return []
    # Cause 0 marks an empty place: ranks have found unequally much.
    table = torch.zeros(engine.world_size, count, 2, dtype=torch.int64)
    for place, (cause, group_id) in enumerate(own):
        table[engine.rank, place] = torch.tensor([CAUSES.index(cause) + 1, group_id])
    rows = engine.all_reduce(table, "sum").reshape(-1, 2).tolist()
    return sorted({(CAUSES[cause - 1], group_id) for cause, group_id in rows if cause})


def describe(faults: Sequence[Fault]) -> str:
    """One line, from faults sorted by cause."""
    parts = []
    for cause, members in groupby(faults, key=lambda fault: fault[0]):
        ids = [str(group_id) for _, group_id in members]
        parts.append(f"{cause} of group{'s' if len(ids) > 1 else ''} {', '.join(ids)}")
    return f"not finite: {'; '.join(parts)}"


def groups_of(faults: Iterable[Fault]) -> tuple[int, ...]:
    """The groups that are named, each once, sorted."""
    return tuple(sorted({group_id for _, group_id in faults}))
