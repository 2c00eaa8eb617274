"""Reads a checkpoint in the layout of the published MedTVT-R1 implementation (arXiv 2506.18512) into this model.

Owns: the renaming of its entries, the merge of its adapters, the reordering of its rotary pairs. What the published
model computes, the result computes. Does not own: the checkpoint files, which are no part of this project.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medtvt_rl.model.config import CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig, PerceptionConfig
from medtvt_rl.model.medtvt import MedTVTConfig, MedTVTForCausalLM

Rename = tuple[str, str | Callable[[re.Match[str]], str]]

ECG_STAGE_OFFSET = 4
VIT_HEAD_SIZE = 64
PUBLISHED_RESIDUAL_SCALE = 0.01
# Entries that the published model stores but does not use, or stores twice.
UNUSED = re.compile(r"\.convpath\.|^vit_model\.pooler\.|\.attention\.gate$")
PROJECTORS = {"ecg_xresnet1d101": "ecg", "cxr_vit": "cxr", "lab_fc": "lab"}

TOWER_NAMES: tuple[Rename, ...] = (
    (r"^ecg_encoder\.([012])\.", r"ecg_encoder.stem.\1."),
    (
        r"^ecg_encoder\.([4-7])\.(\d+)\.(convs|idpath)\.",
        lambda m: f"ecg_encoder.stages.{int(m[1]) - ECG_STAGE_OFFSET}.{m[2]}.{m[3].replace('idpath', 'shortcut')}.",
    ),
    (r"^ecg_xresnet1d101_(rnn|attention)\.", r"ecg_encoder.\1."),
    (r"^(ecg_xresnet1d101|cxr_vit|lab_fc)_proj\.", lambda m: f"perception.projectors.{PROJECTORS[m[1]]}.linear."),
    (
        r"^(ecg_xresnet1d101|cxr_vit|lab_fc)_(norm|f1|f2|f3)_([123])\.",
        lambda m: f"perception.projectors.{PROJECTORS[m[1]]}.blocks.{int(m[3]) - 1}.{m[2]}.",
    ),
    (r"^cxr_vit_agg\.", "cxr_encoder.aggregate."),
    (r"^vit_model\.(embeddings|layernorm)\.", r"cxr_encoder.vit.\1."),
    (r"^vit_model\.encoder\.layer\.(\d+)\.", r"cxr_encoder.vit.layers.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(vit\.layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^lab_encoder\.fc([123])\.", lambda m: f"lab_encoder.layers.{2 * int(m[1]) - 2}."),
    (r"^lab_encoder\.layer_norm\.", "lab_encoder.norm."),
    (r"^DynamicWeighting\.gate\.", "perception.gate."),
    (r"^CyclicCrossModalAttention\.multihead_attention\.", "perception.attention."),
    (r"^CyclicCrossModalAttention\.layer_norm\.", "perception.norm."),
)
LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# Linear layers without a bias in the published model; a Hugging Face Llama has one on all of q, k, v, o or on none.
WITHOUT_BIAS = ("self_attn.k_proj", "self_attn.v_proj")


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The entries of a published file: the SFT file wraps them in {"model": ...}, the RL file is bare."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("model", content)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def convert_published(
    state: Mapping[str, Tensor], llama: Mapping[str, Any], placeholder_token_ids: list[int], max_positions: int = 2048
) -> MedTVTForCausalLM:
    """The model of a published checkpoint, in float32, in evaluation mode.

    The stand-ins for missing modalities, which the published model doesn't have, start from small random values.

    Args:
        state: entries by their published names.
        llama: Meta's parameter file: n_heads, norm_eps, rope_theta (n_kv_heads isn't applied there, nor here).
        placeholder_token_ids: of <ecg>, <cxr>, <lab>; 128006, 128007, 128008 in the published tokenizer.

    Raises:
        ValueError: an entry is missing or unknown.
    """
    model = MedTVTForCausalLM(_config(state, llama, placeholder_token_ids, max_positions))
    weights = {
        f"study_tower.{_tower_name(name)}": tensor
        for name, tensor in state.items()
        if not name.startswith("llama.") and not UNUSED.search(name)
    }
    weights |= _language_model(state, int(llama["n_heads"]))
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("perception.stand_in")]
    if missing or unknown:
        raise ValueError(
            f"published checkpoint: no entry for {missing[:5]} ({len(missing)} in all), and {unknown[:5]} "
            f"({len(unknown)} in all) are unknown; is it a MedTVT-R1 checkpoint?"
        )
    return model.eval()


def _tower_name(name: str) -> str:
    for pattern, replacement in TOWER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _config(
    state: Mapping[str, Tensor], llama: Mapping[str, Any], placeholders: list[int], max_positions: int
) -> MedTVTConfig:
    """Sizes read off the shapes of the entries."""
    vocab_size, hidden_size = state["llama.tok_embeddings.weight"].shape
    vit_size, channels, patch, _ = state["vit_model.embeddings.patch_embeddings.projection.weight"].shape
    num_patches = state["vit_model.embeddings.position_embeddings"].shape[1] - 1
    film = CxrEncoderConfig(
        kind="vit",
        image_size=patch * round(num_patches**0.5),
        num_channels=channels,
        normalise="imagenet",
        hidden_size=vit_size,
        num_layers=_num_layers(state, r"vit_model\.encoder\.layer\.(\d+)\."),
        num_heads=vit_size // VIT_HEAD_SIZE,
        intermediate_size=state["vit_model.encoder.layer.0.intermediate.dense.weight"].shape[0],
        patch_size=patch,
    )
    lab_widths = [state[f"lab_encoder.fc{i}.weight"].shape[0] for i in (1, 2, 3)]
    perception = PerceptionConfig(residual_scale=PUBLISHED_RESIDUAL_SCALE, projector="gated")
    return MedTVTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=state["llama.layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=_num_layers(state, r"llama\.layers\.(\d+)\."),
        num_attention_heads=int(llama["n_heads"]),
        rms_norm_eps=float(llama["norm_eps"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(llama["rope_theta"])},
        max_position_embeddings=max_positions,
        attention_bias=True,
        mlp_bias=True,
        placeholder_token_ids=placeholders,
        ecg=dataclasses.asdict(EcgEncoderConfig(kind="xresnet1d101")),
        cxr=dataclasses.asdict(film),
        lab=dataclasses.asdict(LabEncoderConfig(kind="normalised", widths=lab_widths)),
        perception=dataclasses.asdict(perception),
    )


def _num_layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _language_model(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Llama entries under Hugging Face names, adapters merged."""
    weights = {
        "language_model.model.embed_tokens.weight": state["llama.tok_embeddings.weight"],
        "language_model.model.norm.weight": state["llama.norm.weight"],
        "language_model.lm_head.weight": state["llama.output.weight"],
    }
    for layer in range(_num_layers(state, r"llama\.layers\.(\d+)\.")):
        source, target = f"llama.layers.{layer}", f"language_model.model.layers.{layer}"
        for published, name in NORMS.items():
            weights[f"{target}.{name}.weight"] = state[f"{source}.{published}.weight"]
        for published, name in LINEARS.items():
            weight = _with_adapter(state, f"{source}.{published}")
            bias = weight.new_zeros(len(weight)) if name in WITHOUT_BIAS else state[f"{source}.{published}.bias"]
            if name.endswith(("q_proj", "k_proj")):
                weight, bias = _halves(weight, num_heads), _halves(bias, num_heads)
            weights[f"{target}.{name}.weight"] = weight
            weights[f"{target}.{name}.bias"] = bias
    return weights


def _with_adapter(state: Mapping[str, Tensor], name: str) -> Tensor:
    """W + B @ A, without any scale factor, as published."""
    block, _, linear = name.rpartition(".")
    down, up = (state[f"{block}.lora_{linear}_l{i}.weight"].float() for i in (1, 2))
    return state[f"{name}.weight"].float() + up @ down


def _halves(rows: Tensor, num_heads: int) -> Tensor:
    """Reorders each head's rows from interleaved rotary pairs (Meta) to two halves (Hugging Face)."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
