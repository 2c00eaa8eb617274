"""Builds the model that a run starts from: fresh, on a plain Llama, or a MedTVT model to go on from; a plain text model
only fresh.

Owns: sizes, initialisation, new tokens in an existing vocabulary. Does not own: the tokenizer, or any training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from medtvt_rl.data.tokenizer import modality_token_ids
from medtvt_rl.model.config import BackboneConfig, ModelConfig
from medtvt_rl.model.kept_adapter import read_adapter
from medtvt_rl.model.medtvt import MedTVTConfig, MedTVTForCausalLM, load_exactly
from medtvt_rl.model.seal import check_model_folder
from medtvt_rl.types import MODALITIES

EMBEDDING_STD = 0.05
# A small model learns quickest from linear layers of this gain; residual outputs are damped by depth, as in GPT-2.
LINEAR_GAIN = 0.7
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def build_model(config: ModelConfig, tokenizer: Any) -> MedTVTForCausalLM:
    """The model of this configuration, in float32, with every weight trainable.

    Args:
        config: `init` None starts fresh; a folder of a plain Llama gives the backbone; a MedTVT folder gives all.
        tokenizer: a Hugging Face tokenizer that holds <ecg>, <cxr>, <lab>, a pad and an end token.

    Raises:
        ValueError: the tokenizer lacks a token, or the folder holds another kind of model or other sizes.
    """
    placeholders = list(modality_token_ids(tokenizer).values())
    if config.init is None:
        return _fresh_model(config, tokenizer, placeholders)
    if not (Path(config.init) / "config.json").is_file():
        raise ValueError(f"model.init: {config.init!r} holds no config.json; expected a Hugging Face model folder")
    check_model_folder(config.init)
    found = AutoConfig.from_pretrained(config.init, trust_remote_code=False)
    if isinstance(found, MedTVTConfig):
        model = load_exactly(MedTVTForCausalLM, config.init, torch.float32)
        kept = read_adapter(config.init)
        if kept is not None:
            kept.merge_into(model)
        _check_same_tower(config, found, config.init)
    elif isinstance(found, LlamaConfig) and found.model_type == "llama":
        model = _model_on_llama(config, config.init, placeholders)
    else:
        raise ValueError(
            f"model.init: {config.init!r} is a {found.model_type!r} model, expected a Llama or a MedTVT folder"
        )
    _fit_vocabulary(model, tokenizer, placeholders)
    return model


def _tower_fields(config: ModelConfig) -> dict[str, Any]:
    return {name: dataclasses.asdict(getattr(config, name)) for name in (*MODALITIES, "perception")}


def _fresh_model(config: ModelConfig, tokenizer: Any, placeholders: list[int]) -> MedTVTForCausalLM:
    model = MedTVTForCausalLM(
        MedTVTConfig(
            placeholder_token_ids=placeholders,
            **_backbone_fields(config.backbone, tokenizer),
            **_tower_fields(config),
        )
    )
    initialise_backbone(model.language_model)
    return model


def build_text_model(sizes: BackboneConfig, tokenizer: Any) -> LlamaForCausalLM:
    """A plain Llama of these sizes with fresh weights, float32; its vocabulary is the tokenizer's."""
    model = LlamaForCausalLM(LlamaConfig(**_backbone_fields(sizes, tokenizer)))
    initialise_backbone(model)
    return model


def _backbone_fields(sizes: BackboneConfig, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": sizes.max_positions,
        "tie_word_embeddings": sizes.tie_embeddings,
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@torch.no_grad()
def initialise_backbone(backbone: LlamaForCausalLM) -> None:
    """Fresh weights for a Llama: embeddings of deviation 0.05, linear layers of 0.7 / sqrt(hidden size).

    Layers that write to the residual stream are divided by sqrt(2 * layers).
    """
    settings = backbone.config
    scale = LINEAR_GAIN * settings.hidden_size**-0.5
    for name, parameter in backbone.named_parameters():
        if parameter.dim() < 2:
            continue
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            nn.init.normal_(parameter, std=EMBEDDING_STD)
        elif name.endswith(RESIDUAL_OUTPUTS):
            nn.init.normal_(parameter, std=scale * (2 * settings.num_hidden_layers) ** -0.5)
        else:
            nn.init.normal_(parameter, std=scale)


def _model_on_llama(config: ModelConfig, folder: str, placeholders: list[int]) -> MedTVTForCausalLM:
    """A fresh tower in front of the Llama in `folder`."""
    backbone = load_exactly(LlamaForCausalLM, folder, torch.float32)
    settings = backbone.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "dtype"):
        settings.pop(key, None)
    medtvt = MedTVTConfig(**settings, placeholder_token_ids=placeholders, **_tower_fields(config))
    model = MedTVTForCausalLM(medtvt)
    model.language_model.load_state_dict(backbone.state_dict())
    model.generation_config = backbone.generation_config
    return model


def _check_same_tower(config: ModelConfig, found: MedTVTConfig, folder: str) -> None:
    wanted = _tower_fields(config)
    differing = [name for name, fields in wanted.items() if fields != {**fields, **(getattr(found, name) or {})}]
    if differing:
        details = "; ".join(
            f"model.{name} is {wanted[name]}, the folder has {getattr(found, name)}" for name in differing
        )
        raise ValueError(f"model.init: {folder!r} was built with other sizes: {details}; use the folder's")


def _fit_vocabulary(model: Any, tokenizer: Any, placeholders: list[int]) -> None:
    """Grows the embedding table to the tokenizer; new rows start at the mean of the old ones."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.output_weight)}.values():
                noise = torch.randn_like(weight[rows:]) * weight[:rows].std(dim=0)
                weight[rows:] = weight[:rows].mean(dim=0) + 0.1 * noise
    model.config.placeholder_token_ids = placeholders
    for settings in (model.config, model.language_model.config, model.generation_config):
        for name, value in _special_ids(tokenizer).items():
            setattr(settings, name, value)
