"""Pre-trained weights of single encoders, from files with the entries of the published layout.

Owns: finding an encoder's entries in a file, under whatever prefix, and copying them into a model. Does not own: names
and shapes (published_layout.py), or whole checkpoints (reference_checkpoint.py). What pools an encoder's output (the
recurrent layer and the attention of the ECG, the weights of the film's tokens) is taken where the file has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medtvt_rl.model.config import ModelConfig
from medtvt_rl.model.published_layout import LAB_WIDTHS, encoder_layout
from medtvt_rl.model.reference_checkpoint import read_published
from medtvt_rl.types import MODALITIES
from medtvt_rl.unreadable import why_unreadable

PUBLISHED_KINDS = {"ecg": "xresnet1d101", "cxr": "vit", "lab": "normalised"}
PREFIXES = {"ecg": "ecg_encoder.", "cxr": "vit_model.", "lab": "lab_encoder."}
FILES = ("model.safetensors", "pytorch_model.bin")
MAX_LISTED = 5


def load_encoders(model: nn.Module, config: ModelConfig) -> None:
    """Copies the weights that model.ecg.init, model.cxr.init and model.lab.init name into a fresh model.

    Raises:
        ValueError: the encoder is not of the published kind, a file cannot be read, or lacks entries.
    """
    own = model.state_dict()
    with torch.no_grad():
        for modality in MODALITIES:
            for target, tensor in read_encoder(config, modality).items():
                own[target].copy_(tensor)


def read_encoder(config: ModelConfig, modality: str) -> dict[str, Tensor]:
    """Name of a weight of the model -> its value, from the file that model.MODALITY.init names; empty without one.

    The tensors are views on the file where it allows that.

    Raises:
        ValueError: as of load_encoders.
    """
    settings: Any = getattr(config, modality)
    if settings.init is None:
        return {}
    key = f"model.{modality}.init"
    if settings.kind != PUBLISHED_KINDS[modality]:
        raise ValueError(f"{key}: needs model.{modality}.kind={PUBLISHED_KINDS[modality]}, not {settings.kind!r}")
    if modality == "lab" and tuple(settings.widths) != LAB_WIDTHS:
        raise ValueError(f"{key}: needs model.lab.widths={list(LAB_WIDTHS)}, not {list(settings.widths)}")
    return _fitting(_read(Path(settings.init), key), modality, config, f"{key}: {settings.init}")


def _read(path: Path, key: str) -> Mapping[str, Tensor]:
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise ValueError(f"{key}: {path} holds none of {', '.join(FILES)}; name the file itself")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{key}: there is no {path}; put the weights there, or name another file")
    try:
        return load_file(path) if path.suffix == ".safetensors" else read_published(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}: {path}: not a readable safetensors file {why_unreadable(path, error)}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _fitting(state: Mapping[str, Tensor], modality: str, config: ModelConfig, source: str) -> dict[str, Tensor]:
    layout = {
        name: entry
        for name, entry in encoder_layout(modality, config.cxr).items()
        if entry.kind == "copied" and entry.target is not None
    }
    trunk = [name.removeprefix(PREFIXES[modality]) for name in layout if name.startswith(PREFIXES[modality])]
    prefix = _prefix(state, trunk, source)
    pooling = [name for name in layout if not name.startswith(PREFIXES[modality])]
    taken = {PREFIXES[modality] + name: state[prefix + name] for name in trunk}
    if all(name in state for name in pooling):
        taken |= {name: state[name] for name in pooling}
    wrong = [
        f"{name} {list(tensor.shape)} (expected {list(layout[name].shape)})"
        for name, tensor in taken.items()
        if tuple(tensor.shape) != layout[name].shape
    ]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} entries of another shape: {', '.join(wrong[:MAX_LISTED])}")
    return {str(layout[name].target): tensor for name, tensor in taken.items()}


def _prefix(state: Mapping[str, Tensor], names: list[str], source: str) -> str:
    """What stands before the encoder's own names in the file."""
    first = names[0]
    prefixes = sorted(key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}"))
    lacking = {prefix: [name for name in names if prefix + name not in state] for prefix in prefixes or [""]}
    best = min(lacking, key=lambda prefix: len(lacking[prefix]))
    if lacking[best]:
        listed = ", ".join(best + name for name in lacking[best][:MAX_LISTED])
        raise ValueError(f"{source}: of {len(names)} entries {len(lacking[best])} are missing: {listed}")
    return best
