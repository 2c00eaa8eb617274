"""A learner's state in files that nobody has to trust: named pieces of float32 tensors and JSON, no pickle.

    rank_00000.safetensors    pieces of parameters and moments, "exp_avg|0|model.norm.weight": kind, first element, name
                              metadata: parameters with their shapes, optimizer steps, random state of the rank

A rank writes what it holds and reads what it needs, by name and element. So a state is no matter of how many ranks or
which ZeRO stage wrote it: any gang reads it, and the same gang goes on bit for bit.

Owns: the format. Does not own: where DeepSpeed holds its pieces (fragments.py), folders, manifests and checksums
(pipelines/checkpoints.py).
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medtvt_rl.learner.fragments import WEIGHT, Fragment

FORMAT = 1
DAMAGE = (SafetensorError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What reading a damaged file raises."""
TORCH_RANDOM, CUDA_RANDOM = "random|torch", "random|cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What one rank keeps of a moment of training.

    Attributes:
        tensors: copies in host memory, or the live ones, where nothing may train before they are written.
        metadata: what else belongs to it, JSON-ready.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @classmethod
    def of(
        cls, fragments: Sequence[Fragment], shapes: dict[str, tuple[int, ...]], world_size: int, copy: bool
    ) -> TrainingState:
        """The present state of a rank.

        Args:
            fragments: what this rank answers for; over all ranks each element of each parameter once.
            shapes: of every parameter that trains.
        """
        tensors = {
            f"{kind}|{fragment.start}|{fragment.name}": _copy_on_host(values) if copy else values.detach()
            for fragment in fragments
            for kind, values in fragment.values().items()
        }
        tensors[TORCH_RANDOM] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors[CUDA_RANDOM] = torch.cuda.get_rng_state()
        kinds = {kind for fragment in fragments for kind in fragment.values()}
        metadata = {
            "format": FORMAT,
            "world_size": world_size,
            "parameters": {name: list(shape) for name, shape in shapes.items()},
            "moments": sorted(kinds - {WEIGHT}),
            "steps": max((fragment.steps for fragment in fragments), default=0),
            "python_random": random.getstate(),
            "numpy_random": [_plain(part) for part in np.random.get_state()],
        }
        return cls(tensors=tensors, metadata=metadata)

    @property
    def num_bytes(self) -> int:
        """What a copy of the tensors takes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path) -> None:
        """Writes the file of a rank, so that it survives a power cut."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path, metadata={"state": json.dumps(self.metadata)})
        with path.open("rb") as file:
            os.fsync(file.fileno())


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's state lies."""
    return folder / f"rank_{rank:05d}.safetensors"


class StateError(ValueError):
    """A state that cannot be read; the message says what is wrong with it."""


class StateReader:
    """The state that a gang wrote, by parameter and element; context manager.

    Raises:
        StateError: a file is missing, is not one of these, or an element of a parameter is in none of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = defaultdict(list)
        self._files: list[Any] = []
        self._headers: list[dict[str, Any]] = []
        self.num_ranks, self.steps = 1, 0
        self.moments: tuple[str, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        path = folder
        try:
            for path in sorted(folder.glob("rank_*.safetensors")):
                self._add(path)
            if len(self._files) != self.num_ranks:
                found = f"{len(self._files)} of the files of {self.num_ranks} ranks are there"
                raise StateError(f"checkpoint {folder}: {found}")
        except StateError:
            self._open.close()
            raise
        except (*DAMAGE, OSError) as error:
            self._open.close()
            raise StateError(f"checkpoint {folder}: {path.name}: {_in_short(error)}; it is damaged") from error

    def _add(self, path: Path) -> None:
        file = self._open.enter_context(safe_open(path, framework="pt"))
        header = json.loads(file.metadata()["state"])
        if header["format"] != FORMAT:
            given = str(header["format"])[:20]
            raise StateError(f"checkpoint {self._folder}: format {given}, this version reads {FORMAT}")
        self.num_ranks = int(header["world_size"])
        self.steps = max(self.steps, int(header["steps"]))
        self.moments = tuple(sorted({*self.moments, *map(str, header["moments"])}))
        if not self._files:
            self.shapes = {name: tuple(map(int, shape)) for name, shape in header["parameters"].items()}
        self._files.append(file)
        self._headers.append(header)
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, start, *name = key.split("|", 2)
            if name:
                piece = file.get_slice(key)
                (size,) = piece.get_shape()
                if piece.get_dtype() != "F32":
                    raise TypeError(f"{kind} is of the type {piece.get_dtype()}, expected F32")
                self._pieces[kind, name[0]].append((int(start), size, piece))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """[count] float32 elements of a parameter, or of one of its moments, from `start`. Raises StateError."""
        found = torch.empty(count, dtype=torch.float32)
        filled = 0
        for first, size, piece in self._pieces.get((kind, name), []):
            low, high = max(first, start), min(first + size, start + count)
            if low < high:
                found[low - start : high - start] = piece[low - first : high - first]
                filled += high - low
        if filled != count:
            raise StateError(
                f"checkpoint {self._folder}: {kind} of {name} has {filled} of the elements {start} to {start + count}"
            )
        return found

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises StateError if other parameters train here than there, or with other shapes."""
        absent, unknown = sorted(shapes.keys() - self.shapes.keys()), sorted(self.shapes.keys() - shapes.keys())
        other = sorted(name for name in shapes.keys() & self.shapes.keys() if shapes[name] != self.shapes[name])
        if absent or unknown or other:
            raise StateError(
                f"checkpoint {self._folder}: lacks {absent[:5]}, holds unknown {unknown[:5]}, and of another shape "
                f"{other[:5]}; it is of another model"
            )

    def restore_random(self, rank: int) -> None:
        """The random state of a rank; one that the state was not written by keeps its own."""
        if rank >= self.num_ranks:
            return
        file, header = self._files[rank], self._headers[rank]
        try:
            torch.set_rng_state(file.get_tensor(TORCH_RANDOM))
            if torch.cuda.is_available() and CUDA_RANDOM in file.keys():  # noqa: SIM118 - not a dict
                torch.cuda.set_rng_state(file.get_tensor(CUDA_RANDOM))
            version, words, gauss = header["python_random"]
            random.setstate((version, tuple(words), gauss))
            name, keys, *rest = header["numpy_random"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        except DAMAGE as error:
            raise StateError(
                f"checkpoint {self._folder}: random state of rank {rank}: {_in_short(error)}; it is damaged"
            ) from error


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _copy_on_host(values: Tensor) -> Tensor:
    return values.detach().clone() if values.device.type == "cpu" else values.detach().cpu()


def _plain(part: Any) -> Any:
    return part.tolist() if isinstance(part, np.ndarray) else part
