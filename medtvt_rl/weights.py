"""The form in which weights travel from the learner to the engines: one flat buffer, an index, a checksum.

Owns: packing and unpacking. Does not own: which tensors are sent (the learner), or the transport (actors/).
One flat uint8 array goes through the Ray object store at memory speed; a dictionary of tensors does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT_BYTES = 64


class WeightBufferError(ValueError):
    """The buffer is not what was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBuffer:
    """Named tensors of one policy version.

    Attributes:
        version: completed optimizer steps of the policy.
        data: [N] uint8.
        index: where each tensor lies.
        checksum: CRC-32 of `data`; every engine returns what it computed over the buffer that reached it.
    """

    version: int
    data: NDArray[np.uint8]
    index: tuple[WeightEntry, ...]
    checksum: int

    def verify(self) -> int:
        """The checksum of the data at hand. Raises WeightBufferError if it isn't the one that was sent."""
        found = zlib.crc32(self.data.data)
        if found != self.checksum:
            raise WeightBufferError(
                f"weights of version {self.version}: checksum {found:#010x}, sent {self.checksum:#010x}; transfer again"
            )
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name with its tensor: a view on the buffer, so read-only where the buffer is."""
        for entry in self.index:
            raw = self.data[entry.offset_bytes : entry.offset_bytes + entry.num_bytes]
            yield entry.name, torch.frombuffer(raw, dtype=getattr(torch, entry.dtype)).reshape(entry.shape)


def pack_weights(version: int, named: Iterable[tuple[str, torch.Tensor]]) -> WeightBuffer:
    """Copies named tensors into one buffer. Tensors that share storage (tied) are the caller's to drop."""
    tensors = [(name, tensor.detach().contiguous().cpu()) for name, tensor in named]
    index, offset = [], 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        index.append(
            WeightEntry(name=name, dtype=dtype, shape=tuple(tensor.shape), offset_bytes=offset, num_bytes=num_bytes)
        )
        offset += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    data = np.zeros(offset, dtype=np.uint8)
    for entry, (_, tensor) in zip(index, tensors):
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        data[entry.offset_bytes : entry.offset_bytes + entry.num_bytes] = flat
    return WeightBuffer(version=version, data=data, index=tuple(index), checksum=zlib.crc32(data.data))
