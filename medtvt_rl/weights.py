"""The form in which weights travel from the learner to the engines: one flat buffer, an index, a checksum.

Owns: packing and unpacking, and the one formula by which an adapter is merged, in the learner and in the engine. Does
not own: which tensors are sent (the learner), or the transport (actors/weight_transfer.py).
One flat uint8 array goes through the Ray object store at memory speed; a dictionary of tensors does not.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT_BYTES = 64


class WeightBufferError(ValueError):
    """The buffer is not what was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What an adapter adds to a weight [out, in]: scale * up @ down (arXiv 2106.09685).

    Attributes:
        down: [r, in].
        up: [out, r].
        dtype: of the learner's weight beneath.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    dtype: torch.dtype

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight [out, in]: summed in float32 from the weight as the learner has it, then cast as it is."""
        device = weight.device
        product = self.up.to(device).float() @ self.down.to(device).float()
        return (weight.to(self.dtype).float() + self.scale * product).to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """Where the factors of one adapter lie; `name` is the weight that it is added to."""

    name: str
    down: WeightEntry
    up: WeightEntry
    scale: float
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBuffer:
    """Named tensors of one policy version.

    Attributes:
        version: completed optimizer steps of the policy.
        data: [N] uint8; none at all in a header, whose bytes travel another way.
        index: where each whole tensor lies.
        adapters: where the adapters lie that travel unmerged.
        checksum: CRC-32 of `data`; every engine returns what it computed over the buffer that reached it.
    """

    version: int
    data: NDArray[np.uint8]
    index: tuple[WeightEntry, ...]
    checksum: int
    adapters: tuple[AdapterEntry, ...] = ()

    def verify(self) -> int:
        """The checksum of the data at hand. Raises WeightBufferError if it isn't the one that was sent."""
        return self.check(zlib.crc32(self.data.data))

    def check(self, found: int) -> int:
        """The checksum that was found over the data, wherever it is. Raises WeightBufferError if it isn't the one that
        was sent.
        """
        if found != self.checksum:
            raise WeightBufferError(
                f"weights of version {self.version}: checksum {found:#010x}, sent {self.checksum:#010x}; transfer again"
            )
        return found

    @property
    def num_bytes(self) -> int:
        """Of the data, by the index."""
        entries = [*self.index, *(factor for entry in self.adapters for factor in (entry.down, entry.up))]
        return max((_end(entry) for entry in entries), default=0)

    @property
    def is_header(self) -> bool:
        """Whether the data is left out."""
        return self.data.nbytes == 0 < self.num_bytes

    def header(self) -> WeightBuffer:
        """Everything but the data: a few kilobytes."""
        return replace(self, data=np.empty(0, dtype=np.uint8))

    def with_data(self, data: NDArray[np.uint8]) -> WeightBuffer:
        """The buffer of which this is the header. Raises WeightBufferError if it has another number of bytes."""
        if data.nbytes != self.num_bytes:
            raise WeightBufferError(
                f"weights of version {self.version}: {data.nbytes} bytes, indexed {self.num_bytes}; transfer again"
            )
        return replace(self, data=data)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name with its whole tensor: a view on the buffer, so read-only where the buffer is."""
        for entry in self.index:
            yield entry.name, self._view(entry)

    def low_ranks(self) -> Iterator[tuple[str, LowRank]]:
        """The name of each adapted weight with what is to be added to it; the factors are views on the buffer."""
        for entry in self.adapters:
            down, up = self._view(entry.down), self._view(entry.up)
            yield entry.name, LowRank(down=down, up=up, scale=entry.scale, dtype=getattr(torch, entry.dtype))

    def _view(self, entry: WeightEntry) -> torch.Tensor:
        dtype: Any = getattr(torch, entry.dtype, None)
        fits = isinstance(dtype, torch.dtype) and entry.num_bytes == math.prod(entry.shape) * dtype.itemsize
        inside = entry.offset_bytes >= 0 and entry.offset_bytes + entry.num_bytes <= self.data.nbytes
        if not fits or not inside or any(size < 0 for size in entry.shape):
            raise WeightBufferError(
                f"weights of version {self.version}: the index has {entry.name} as {entry.dtype} {entry.shape} in "
                f"{entry.num_bytes} bytes at {entry.offset_bytes} of {self.data.nbytes}; transfer again"
            )
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        raw = self.data[entry.offset_bytes : entry.offset_bytes + entry.num_bytes]
        with warnings.catch_warnings():
            # The buffer may be read-only, and it is only read.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)


def pack_weights(version: int, named: Iterable[tuple[str, torch.Tensor | LowRank]]) -> WeightBuffer:
    """Copies named tensors and adapters into one buffer. Tensors that share storage (tied) are the caller's to drop."""
    whole: dict[str, torch.Tensor] = {}
    low_ranks: dict[str, LowRank] = {}
    for name, weight in named:
        if isinstance(weight, LowRank):
            low_ranks[name] = weight
        else:
            whole[name] = _on_host(weight)
    down = {name: _on_host(low_rank.down) for name, low_rank in low_ranks.items()}
    up = {name: _on_host(low_rank.up) for name, low_rank in low_ranks.items()}
    index, offset = _lay_out(whole, 0)
    down_index, offset = _lay_out(down, offset)
    up_index, offset = _lay_out(up, offset)
    data = np.zeros(offset, dtype=np.uint8)
    for entries, tensors in ((index, whole), (down_index, down), (up_index, up)):
        for entry in entries:
            flat = tensors[entry.name].reshape(-1).view(torch.uint8).numpy()
            data[entry.offset_bytes : entry.offset_bytes + entry.num_bytes] = flat
    adapters = tuple(
        AdapterEntry(name=a.name, down=a, up=b, scale=low_ranks[a.name].scale, dtype=_name(low_ranks[a.name].dtype))
        for a, b in zip(down_index, up_index)
    )
    checksum = zlib.crc32(data.data)
    return WeightBuffer(version=version, data=data, index=tuple(index), checksum=checksum, adapters=adapters)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().cpu()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lay_out(tensors: dict[str, torch.Tensor], offset: int) -> tuple[list[WeightEntry], int]:
    """Places for tensors from `offset` on, and the first byte behind them."""
    entries = []
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        shape, dtype = tuple(tensor.shape), _name(tensor.dtype)
        entries.append(WeightEntry(name=name, dtype=dtype, shape=shape, offset_bytes=offset, num_bytes=num_bytes))
        offset = _end(entries[-1])
    return entries, offset


def _end(entry: WeightEntry) -> int:
    """The first byte that another tensor may have."""
    return entry.offset_bytes + -(-entry.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
