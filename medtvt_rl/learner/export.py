"""The weights that a training run changes, packed for the rollout engines.

Owns: which parameters are gathered and sent. Does not own: their names and the merging of adapters (model/policy.py),
or the buffer (weights.py).
"""

from __future__ import annotations

from torch import nn

from medtvt_rl.learner.engine import TrainingEngine
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.weights import WeightBuffer, pack_weights


def export_weights(engine: TrainingEngine, version: int) -> WeightBuffer | None:
    """What trains, under the engines' names, adapters merged; None on every rank but 0. Called on all ranks.

    Frozen weights are neither gathered nor sent: the engines have them from the model folder.
    """
    with engine.gathered(exported_parameters(engine.policy)):
        if engine.rank != 0:
            return None
        return pack_weights(version, named_weights(engine.policy, trained_only=True))


def exported_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """Parameters that an export reads: those that train, and the frozen weights beneath adapters."""
    adapted: list[nn.Module] = [module for module in policy.modules() if hasattr(module, "lora_A")]
    beneath = [parameter for module in adapted for parameter in module.get_submodule("base_layer").parameters()]
    return [parameter for parameter in policy.parameters() if parameter.requires_grad] + beneath
