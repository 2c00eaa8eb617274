"""Every weight of a policy under the name that the model folder and the rollout engine know.

Owns: these names, the functional merge of low-rank adapters, which tensors learn. Does not own: the policies
(policy.py, medtvt.py), or transport (medtvt_rl/weights.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


def named_weights(policy: nn.Module, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that the model folder and the rollout engine know.

    Adapters are merged functionally, W + alpha / r * B @ A, and the policy is left as it is; tied tensors come once;
    the persistent buffers (BatchNorm statistics) come, too. Tensors are detached, not copied, where nothing is merged.

    Args:
        trained_only: leaves out what has no gradient (and the buffers of modules that do not learn).
    """
    prefix = getattr(policy, "weight_prefix", "")
    seen: set[int] = set()
    for path, module in policy.named_modules():
        if _inside_adapter(path):
            continue
        for name, tensor, learns in _own_weights(module):
            if id(tensor) in seen or (trained_only and not learns):
                continue
            seen.add(id(tensor))
            full = f"{path}.{name}" if path else name
            yield full.removeprefix(prefix).replace(".base_layer.", "."), _merged(module, name, tensor)


def _inside_adapter(path: str) -> bool:
    """Whether a module path lies within an adapted layer: its weights come merged with the layer itself."""
    return any(part.startswith("lora_") or part == "base_layer" for part in path.split("."))


def _own_weights(module: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it learns) of a module's own parameters and persistent buffers."""
    if hasattr(module, "lora_A"):
        adapted = ADAPTER in module.lora_A
        for name, parameter in module.base_layer.named_parameters(recurse=False):
            yield name, parameter, parameter.requires_grad or (adapted and name == "weight")
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter, parameter.requires_grad
    learns = any(p.requires_grad for p in module.parameters(recurse=False))
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer, learns


def _merged(module: Any, name: str, tensor: Tensor) -> Tensor:
    """The weight with its adapter's product added, where it has one."""
    if name != "weight" or not hasattr(module, "lora_A") or ADAPTER not in module.lora_A:
        return tensor.detach()
    down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    with torch.no_grad():
        return (tensor.float() + module.scaling[ADAPTER] * (up.float() @ down.float())).to(tensor.dtype)
