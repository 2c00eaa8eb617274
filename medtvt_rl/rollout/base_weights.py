"""The weights of a model folder beneath adapters, read where they lie.

Owns: finding a tensor in the folder's safetensors files, whole or sharded, through a memory map, and merging adapters
into it one weight at a time, so that no second copy of the model is ever held. Does not own: the formula (weights.py),
or the engine's weights (vllm_core.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from medtvt_rl.weights import LowRank

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseWeights:
    """Tensors of a Hugging Face folder by name; on a CPU each is a view on the file.

    Raises:
        ValueError: the folder holds no safetensors files.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._open: dict[str, Any] = {}
        if (self._folder / INDEX).is_file():
            self._file_of: dict[str, str] = json.loads((self._folder / INDEX).read_text())["weight_map"]
        elif (self._folder / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(
                f"model folder: {folder} holds neither {SINGLE} nor {INDEX}, and adapters that come unmerged need the "
                "weights beneath; save the model as safetensors, or set weights.send=merged"
            )

    def __getitem__(self, name: str) -> Tensor:
        """Raises ValueError where the folder has no such weight."""
        if name not in self._file_of:
            raise ValueError(
                f"model folder: {self._folder} has no weight {name!r}, for which an adapter came; learner and engine "
                "must start from the same folder"
            )
        return self._handle(self._file_of[name]).get_tensor(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="pt")
        return self._open[file]


def merged_weights(
    folder: str | Path, low_ranks: Iterable[tuple[str, LowRank]], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each adapted weight of the folder with its adapter merged, computed on `device` when it is asked for."""
    base = BaseWeights(folder)
    for name, low_rank in low_ranks:
        yield name, low_rank.added_to(base[name].to(device))
