"""Writes a safetensors file tensor by tensor, so that no more than a block of one is ever held.

Owns: the order of the tensors and the bytes of the file. Does not own: reading, which the library does; its own writer
wants every tensor of the file in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from medtvt_rl.model.reference_checkpoint import Weight

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
ALIGNMENT = 8


def write_safetensors(path: Path, weights: Sequence[Weight]) -> Iterator[int]:
    """Writes the file as the iterator is exhausted; yields the bytes of each block, once they are written.

    Wide types come first, so that every tensor is aligned to its own.
    """
    ordered = sorted(weights, key=lambda weight: -weight.dtype.itemsize)
    header = _header(ordered)
    with path.open("wb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for weight in ordered:
            left = weight.num_bytes
            for block in weight.blocks():
                data = memoryview(block.reshape(-1).view(torch.uint8).numpy().data)
                left -= len(data)
                while len(data):
                    data = data[file.write(data) :]
                yield block.nbytes
            assert left == 0, f"{weight.name}: {left} bytes too few"


def _header(weights: Sequence[Weight]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in weights:
        end = offset + weight.num_bytes
        content[weight.name] = {
            "dtype": DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)
