"""Attention heads of a size for which vLLM's attention on a CPU has no kernel: they are padded with zeros.

Owns: which size is taken, and the padding. Does not own: the attention itself. Zeros in queries and keys change no
score, and zeros in values are cut off again, so that the result is that of unpadded heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vllm.model_executor.models.llama as llama
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform


class PaddedAttention(Attention):
    """Attention over heads of the next larger size that has a kernel."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **options: Any) -> None:
        super().__init__(num_heads, kernel_size(head_size), scale, **options)
        self.own_size = head_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """[N, heads * size] each -> [N, heads * size]."""
        query, key, value = self._padded(query), self._padded(key), self._padded(value)
        result = super().forward(query, key, value, *arguments, **options)
        return result.unflatten(-1, (-1, self.head_size))[..., : self.own_size].flatten(-2)

    def _padded(self, values: Tensor) -> Tensor:
        heads = values.unflatten(-1, (-1, self.own_size))
        return functional.pad(heads, (0, self.head_size - self.own_size)).flatten(-2)


def kernel_size(head_size: int) -> int:
    """The smallest size with a kernel that holds such heads. Raises ValueError if there is none."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= head_size]
    if not sizes:
        raise ValueError(
            f"config.json: heads of size {head_size}, and vLLM's attention on a CPU has no kernel for them"
        )
    return min(sizes)


@contextmanager
def padded_heads(head_size: int) -> Iterator[None]:
    """Llamas that are built inside have padded heads, where this machine needs it."""
    if not current_platform.is_cpu() or kernel_size(head_size) == head_size:
        yield
        return
    llama.Attention = PaddedAttention  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        llama.Attention = Attention  # type: ignore[misc]
