"""A checkpoint in the layout of the published MedTVT-R1 implementation (arXiv 2506.18512), as weights of this model.

Owns: the file, the check of its entries, the merge of its low-rank pairs, the reordering of its rotary pairs. What the
published model computes, the result computes. Does not own: names and shapes (published_layout.py), the folder that is
written (reference_folder.py), or the checkpoint files, which are no part of this project.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from medtvt_rl.model.perception import STAND_IN_STD
from medtvt_rl.model.published_layout import WITHOUT_BIAS, PublishedEntry, low_rank_names, published_layout
from medtvt_rl.model.published_sizes import PublishedSizes
from medtvt_rl.types import MODALITIES
from medtvt_rl.unreadable import is_lfs_pointer, why_unreadable

EMBEDDINGS = "llama.tok_embeddings.weight"
# The SFT file, Lightning, and the published ECG encoder.
WRAPPERS = ("model", "state_dict", "ecg_model")
MAX_LISTED = 50
ROWS_AT_ONCE = 512
FOREIGN = re.compile(r"GLOBAL ([\w.]+)")
# What training scripts keep beside the weights: bags of plain values, and paths, which become pure ones that open
# nothing and exist on every system. Python 3.13 saves paths under a module of its own.
PLAIN_VALUES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *(
        (pure, f"{module}.{name}")
        for pure, kind in ((PurePosixPath, "PosixPath"), (PureWindowsPath, "WindowsPath"))
        for module in ("pathlib", "pathlib._local")
        for name in (kind, f"Pure{kind}")
    ),
]
STAND_IN = "study_tower.perception.stand_in"


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The entries of a published file: the SFT file wraps them in {"model": ...}, the RL file is bare.

    The tensors are views on the file, which is mapped into memory, unless it was saved in torch's format of before 1.6.

    Raises:
        ValueError: it isn't a file that torch saved, or it holds something else than named tensors.
    """
    try:
        with torch.serialization.safe_globals(PLAIN_VALUES):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if is_lfs_pointer(path):
            raise ValueError(f"{path}: not a readable torch checkpoint {why_unreadable(path, error)}") from None
        # torch's own words advise to load it all the same.
        found = FOREIGN.search(str(error))
        reason = f"it holds {found[1]}" if found else "it holds something else, or is none"
        raise ValueError(
            f"{path}: not a file of plain tensors ({reason}); load it where it was made, and save its state_dict alone"
        ) from None
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path}: not a readable torch checkpoint {why_unreadable(path, error)}") from error
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(
            f'{path}: expected a state_dict of tensors, bare or under "model"; is it a MedTVT-R1 checkpoint?'
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight of this model, made when it is asked for.

    Attributes:
        blocks: the weight in consecutive blocks of rows, each contiguous and of that dtype; views on the checkpoint
            where nothing is computed. A block is valid until the next is taken.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class LayoutError(ValueError):
    """Entries of a checkpoint that are not those of its layout.

    Attributes:
        listing: all of them, a line each; "" where the message itself has them all.
    """

    def __init__(self, message: str, listing: str) -> None:
        super().__init__(message)
        self.listing = listing


class PublishedCheckpoint:
    """A checkpoint whose entries are exactly those of its sizes.

    Attributes:
        vocab_size: rows of the embedding table.
        rank: of the low-rank pairs.
        dtype: the widest of its floating point entries.

    Raises:
        LayoutError: entries are missing, unknown, of another shape or kind; the message lists them.
    """

    def __init__(self, state: Mapping[str, Tensor], sizes: PublishedSizes) -> None:
        self._state, self._sizes = state, sizes
        self.vocab_size = sizes.vocab_size or (_rows(state[EMBEDDINGS]) if EMBEDDINGS in state else 0)
        downs = (name for name in state if ".lora_" in name and name.endswith("_l1.weight"))
        ranks = Counter(_rows(state[name]) for name in downs)
        self.rank = max(ranks, key=ranks.__getitem__, default=0)
        self._layout = published_layout(sizes, self.vocab_size, self.rank)
        self._check()
        self.dtype = self._widest()

    def __len__(self) -> int:
        return len(self._layout)

    def weights(self, merge: bool) -> list[Weight]:
        """Every weight of the model, in the order of the file.

        A merged weight is summed in float32 and kept in the wider type of weight and pair. The stand-ins for missing
        modalities, which the published model doesn't have, start from small random values, always the same.

        Args:
            merge: low-rank pairs are merged; otherwise they are left out.
        """
        found = [self._weight(name, entry, merge) for name, entry in self._layout.items() if _is_weight(entry)]
        for name, entry in self._layout.items():
            if entry.target is not None and name.removesuffix(".weight").endswith(WITHOUT_BIAS):
                bias = entry.target.removesuffix("weight") + "bias"
                found.append(self._made(bias, entry.shape[:1], self._state[name].dtype, torch.zeros))
        shape = (len(MODALITIES), 1, self._sizes.dim)
        found.append(self._made(STAND_IN, shape, self.dtype, _stand_in))
        return found

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The low-rank pair of each adapted weight: what is applied first [r, in], and second [out, r]."""
        return {
            str(entry.target): self._pair(name, entry)
            for name, entry in self._layout.items()
            if entry.kind in ("linear", "rotary") and name.endswith(".weight")
        }

    def _pair(self, name: str, entry: PublishedEntry) -> tuple[Tensor, Tensor]:
        down, up = (self._state[pair] for pair in low_rank_names(name))
        return down, self._halves(up) if entry.kind == "rotary" else up

    def _weight(self, name: str, entry: PublishedEntry, merge: bool) -> Weight:
        tensor, dtype = self._state[name], self._state[name].dtype
        halves = self._halves if entry.kind == "rotary" else torch.Tensor.contiguous
        if not (merge and name.endswith(".weight") and entry.kind in ("linear", "rotary")):
            blocks: Callable[[], Iterator[Tensor]] = lambda: iter([halves(tensor)])  # noqa: E731
        else:
            for pair in low_rank_names(name):
                dtype = torch.promote_types(dtype, self._state[pair].dtype)
            blocks = lambda: (halves(block).to(dtype) for block in self._merged(name))  # noqa: E731
        return Weight(name=str(entry.target), shape=entry.shape, dtype=dtype, blocks=blocks)

    def _made(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[..., Tensor]) -> Weight:
        return Weight(name=name, shape=shape, dtype=dtype, blocks=lambda: iter([make(shape, dtype=dtype)]))

    def _merged(self, name: str) -> Iterator[Tensor]:
        """W + B @ A in float32, without any scale factor, as published, in blocks of whole heads.

        One buffer takes every block: it stays in the processor's cache, and no memory is asked for anew.
        """
        weight, head = self._state[name], self._sizes.dim // self._sizes.num_heads
        down, up = (self._state[pair].float() for pair in low_rank_names(name))
        step = head * max(1, ROWS_AT_ONCE // head)
        buffer = torch.empty(step, weight.shape[1])
        for first in range(0, len(weight), step):
            block = weight[first : first + step]
            yield buffer[: len(block)].copy_(block).addmm_(up[first : first + step], down)

    def _halves(self, rows: Tensor) -> Tensor:
        """Reorders the rows of whole heads from interleaved rotary pairs (Meta) to two halves (Hugging Face)."""
        half = self._sizes.dim // self._sizes.num_heads // 2
        return rows.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)

    def _widest(self) -> torch.dtype:
        found = {tensor.dtype for tensor in self._state.values() if tensor.is_floating_point()}
        widest = found.pop()
        for dtype in found:
            widest = torch.promote_types(widest, dtype)
        return widest

    def _check(self) -> None:
        state, layout = self._state, self._layout
        wrong = [
            f"{name} {_described(state[name])} (expected {list(entry.shape)} {'float' if _is_float(name) else 'int64'})"
            for name, entry in layout.items()
            if name in state and not _fits(name, state[name], entry)
        ]
        faults = {
            "missing": [name for name in layout if name not in state],
            "unknown": [name for name in state if name not in layout],
            "of another shape or type": wrong,
        }
        if not any(faults.values()):
            faults["stored twice with different values"] = self._different_copies()
        told = [f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names]
        if told:
            lines = [f"{fault}: {name}" for fault, names in faults.items() for name in names]
            raise LayoutError(
                f"checkpoint: of {len(layout)} entries {'; '.join(told)}. Is it a MedTVT-R1 checkpoint, and are "
                "the parameter files its own?",
                "\n".join(lines) if max(map(len, faults.values())) > MAX_LISTED else "",
            )

    def _different_copies(self) -> list[str]:
        first = {entry.target: name for name, entry in self._layout.items() if entry.kind == "copied"}
        return [
            name
            for name, entry in self._layout.items()
            if entry.kind == "copy" and not torch.equal(self._state[name], self._state[first[entry.target]])
        ]


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _is_weight(entry: PublishedEntry) -> bool:
    return entry.kind in ("copied", "linear", "rotary")


def _is_float(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _fits(name: str, tensor: Tensor, entry: PublishedEntry) -> bool:
    right_type = tensor.is_floating_point() if _is_float(name) else tensor.dtype == torch.int64
    return tuple(tensor.shape) == entry.shape and right_type


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (STAND_IN_STD * values).to(dtype)
