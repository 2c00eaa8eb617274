"""The sizes of a published MedTVT-R1 model (arXiv 2506.18512), from the two parameter files that come with it.

Owns: reading and checking Meta's params.json and the Vision Transformer's config.json. Does not own: what follows from
the sizes (published_layout.py). Importable without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtvt_rl.model.config import CxrEncoderConfig

FIELDS_OF_PARAMS = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps", "rope_theta")
MAX_POSITIONS = 2048
NUM_CHANNELS = 3
# What this model's film encoder computes; a file that says otherwise describes another one.
FIXED_VIT: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "num_channels": NUM_CHANNELS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSizes:
    """The sizes of the language model and of the film encoder. The others are fixed.

    Attributes:
        vocab_size: None where the parameter file leaves it to the checkpoint.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int | None
    norm_eps: float
    rope_theta: float
    max_positions: int
    film: CxrEncoderConfig

    @classmethod
    def read(cls, params: Path, vit: Path) -> PublishedSizes:
        """From Meta's params.json and the Vision Transformer's config.json. Raises ValueError naming file and field."""
        return cls.of(_read_object(params), _read_object(vit), str(params), str(vit))

    @classmethod
    def of(
        cls, params: Mapping[str, Any], vit: Mapping[str, Any], params_name: str = "params", vit_name: str = "vit"
    ) -> PublishedSizes:
        """From the files' contents. `n_kv_heads` isn't applied by the published model, nor here."""
        number = {field: _number(params, field, params_name) for field in FIELDS_OF_PARAMS}
        dim, heads, multiple = int(number["dim"]), int(number["n_heads"]), int(number["multiple_of"])
        if dim % heads or dim // heads % 2:
            raise ValueError(f"{params_name}: dim {dim} and n_heads {heads} give no even head size; is it Meta's file?")
        ffn = int(2 * 4 * dim / 3)
        if params.get("ffn_dim_multiplier") is not None:
            ffn = int(_number(params, "ffn_dim_multiplier", params_name) * ffn)
        vocab_size = params.get("vocab_size", -1)
        return cls(
            dim=dim,
            num_layers=int(number["n_layers"]),
            num_heads=heads,
            ffn_size=-(-ffn // multiple) * multiple,
            vocab_size=vocab_size if isinstance(vocab_size, int) and vocab_size > 0 else None,
            norm_eps=number["norm_eps"],
            rope_theta=number["rope_theta"],
            max_positions=int(_number({"max_seq_len": MAX_POSITIONS, **params}, "max_seq_len", params_name)),
            film=_film(vit, vit_name),
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable json file ({error}); check the path") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of fields, found {type(content).__name__}")
    return content


def _number(fields: Mapping[str, Any], field: str, source: str) -> float:
    value = fields.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{source}: {field} is {value!r}, expected a number above 0")
    return value


def _film(vit: Mapping[str, Any], source: str) -> CxrEncoderConfig:
    differing = {name: vit[name] for name, value in FIXED_VIT.items() if vit.get(name, value) != value}
    if differing:
        raise ValueError(f"{source}: {differing}, expected { ({name: FIXED_VIT[name] for name in differing}) }")
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    size, layers, heads, inner, image, patch = (int(_number(vit, field, source)) for field in fields)
    if size % heads or image % patch:
        raise ValueError(
            f"{source}: num_attention_heads {heads} must divide hidden_size {size}, and patch_size {patch} image_size "
            f"{image}"
        )
    return CxrEncoderConfig(
        kind="vit",
        normalise="imagenet",
        image_size=image,
        num_channels=NUM_CHANNELS,
        hidden_size=size,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        patch_size=patch,
    )
