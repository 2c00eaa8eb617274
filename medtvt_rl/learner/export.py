"""The weights that a training run changes, packed for the rollout engines.

Owns: which weights are gathered and sent. Does not own: their names (model/named_weights.py), the merge of adapters and
the buffer (weights.py), or the setting (rollout/config.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from medtvt_rl.learner.engine import TrainingEngine
from medtvt_rl.model.named_weights import named_weights, unmerged_weights
from medtvt_rl.rollout.config import Sent
from medtvt_rl.weights import LowRank, WeightBuffer, pack_weights


def export_weights(engine: TrainingEngine, version: int, send: Sent = "merged") -> WeightBuffer | None:
    """The weights of a version under the engines' names; None on every rank but 0. Called on all ranks.

    Args:
        send: see WeightsConfig. What is not sent is not gathered either: the engines have it from the model folder.
    """
    with engine.gathered(exported_parameters(engine.policy, send)):
        if engine.rank != 0:
            return None
        return pack_weights(version, _sent(engine.policy, send))


def exported_parameters(policy: nn.Module, send: Sent = "merged") -> list[nn.Parameter]:
    """Parameters that an export reads; the frozen weights beneath adapters only where the learner merges."""
    if send == "full":
        return list(policy.parameters())
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if send != "merged":
        return learning
    adapted: list[nn.Module] = [module for module in policy.modules() if hasattr(module, "lora_A")]
    return learning + [parameter for module in adapted for parameter in module.get_submodule("base_layer").parameters()]


def _sent(policy: nn.Module, send: Sent) -> Iterator[tuple[str, Tensor | LowRank]]:
    """`adapter` is `trainable` for a policy in which nothing large learns; the configuration has seen to that."""
    if send in ("adapter", "trainable"):
        yield from unmerged_weights(policy)
    else:
        yield from named_weights(policy, trained_only=send == "merged")
