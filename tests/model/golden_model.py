"""The golden checkpoint: weights drawn from their names, inputs from the seed, and the published model's outputs.

golden/reference_model.json names and shapes every entry; the arrays in golden/reference_model.npz are the published
implementation's outputs for two studies, float32 on a CPU.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
DESCRIPTION: dict[str, Any] = json.loads((GOLDEN / "reference_model.json").read_text())
TOKENS: dict[str, int] = DESCRIPTION["special_tokens"]


def generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[DESCRIPTION["seed"], key]))


def weight(name: str, shape: list[int], dtype: str) -> Tensor:
    if dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    draw = generator(zlib.crc32(name.replace(".convpath.0.", ".convs.").encode()))
    x = np.asarray(draw.standard_normal(shape or None, dtype=np.float32), dtype=np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif last == "running_mean" or x.ndim < 2:
        x = 0.1 * x if last != "weight" else 1 + 0.1 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def golden_state() -> dict[str, Tensor]:
    """Every entry of the checkpoint."""
    return {name: weight(name, *kind) for name, kind in DESCRIPTION["state_dict"].items()}


def golden_inputs() -> dict[str, Tensor]:
    """Two studies, as the model takes them."""
    size = DESCRIPTION["batch"]
    return {
        "ecg": torch.from_numpy(generator(1).standard_normal((size, 12, 1000), dtype=np.float32)),
        "cxr": torch.from_numpy(generator(2).standard_normal((size, 3, 224, 224), dtype=np.float32)),
        "lab": torch.from_numpy(generator(3).random((size, 100), dtype=np.float32)),
    }


def golden_arrays() -> dict[str, np.ndarray]:
    """The published model's outputs, its tokens and labels."""
    with np.load(GOLDEN / "reference_model.npz") as arrays:
        return dict(arrays)


def write_files(folder: Path, state: dict[str, Tensor]) -> dict[str, Path]:
    """A published SFT file with its parameter files and token ids, under the names of the importer's arguments."""
    files = {
        "checkpoint": folder / "sft.pth",
        "params": folder / "params.json",
        "vit_config": folder / "vit.json",
        "special_tokens": folder / "tokens.json",
    }
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, files["checkpoint"])
    files["params"].write_text(json.dumps(DESCRIPTION["llama_params"]))
    files["vit_config"].write_text(json.dumps(DESCRIPTION["vit"]))
    files["special_tokens"].write_text(json.dumps(TOKENS))
    return files
