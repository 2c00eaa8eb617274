"""Every weight of a policy under the name that the model folder and the rollout engine know.

Owns: these names, which tensors learn, and which of them have an adapter. Does not own: the policies (policy.py,
medtvt.py), the merge of an adapter, or transport (medtvt_rl/weights.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from medtvt_rl.weights import LowRank

ADAPTER = "default"


def named_weights(policy: nn.Module, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that the model folder and the rollout engine know.

    Adapters are merged functionally, W + alpha / r * B @ A, and the policy is left as it is; tied tensors come once;
    the persistent buffers (BatchNorm statistics) come, too. Tensors are detached, not copied, where nothing is merged.

    Args:
        trained_only: leaves out what has no gradient (and the buffers of modules that do not learn).
    """
    for name, tensor, low_rank in _walk(policy, trained_only):
        yield name, tensor.detach() if low_rank is None else low_rank.added_to(tensor.detach())


def unmerged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor | LowRank]]:
    """What learns, under the same names: an adapted weight comes as its adapter, and the one beneath is not read."""
    for name, tensor, low_rank in _walk(policy, trained_only=True):
        if low_rank is None:
            yield name, tensor.detach()
        else:
            yield name, low_rank.added_to(tensor.detach()) if tensor.requires_grad else low_rank


def _walk(policy: nn.Module, trained_only: bool) -> Iterator[tuple[str, Tensor, LowRank | None]]:
    """(name, tensor, its adapter) of every weight, tied ones once."""
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
            yield full.removeprefix(prefix).replace(".base_layer.", "."), tensor, _adapter(module, name, tensor)


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


def _adapter(module: Any, name: str, tensor: Tensor) -> LowRank | None:
    """What is added to a module's weight, where it has an adapter."""
    if name != "weight" or not hasattr(module, "lora_A") or ADAPTER not in module.lora_A:
        return None
    return LowRank(
        down=module.lora_A[ADAPTER].weight.detach(),
        up=module.lora_B[ADAPTER].weight.detach(),
        scale=module.scaling[ADAPTER],
        dtype=tensor.dtype,
    )
