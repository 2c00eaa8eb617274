"""Settings of the tri-modal model and of the policy's adapters. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medtvt_rl.data.config import Normalisation


@dataclass
class BackboneConfig:
    """Sizes of a Llama backbone that starts from random weights; ignored where `init` names a pre-trained one."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 336
    max_positions: int = 512
    vocab_size: int = 700
    tie_embeddings: bool = True


@dataclass
class EcgEncoderConfig:
    """`conv`: a small 1-D convolutional net of these widths. `xresnet1d101`: the published encoder."""

    kind: Literal["conv", "xresnet1d101"] = "conv"
    widths: list[int] = field(default_factory=lambda: [24, 32, 48, 64])


@dataclass
class CxrEncoderConfig:
    """`conv`: a small 2-D convolutional net of these widths. `vit`: the published Vision Transformer (ViT-B/16).

    Attributes:
        head: of `conv`: "pool" keeps mean and maximum of each channel, "flat" adds a coarse map of where things are.
        normalise: of values in 0..1: "centred" is (x - 0.5) / 0.25; "imagenet" takes the mean and deviation of each
            of three channels that the published encoder was trained with.
        hidden_size, num_layers, num_heads, intermediate_size, patch_size: of `vit`.
    """

    kind: Literal["conv", "vit"] = "conv"
    widths: list[int] = field(default_factory=lambda: [16, 32, 64, 96])
    head: Literal["pool", "flat"] = "pool"
    image_size: int = 96
    num_channels: int = 1
    normalise: Normalisation = "centred"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16


@dataclass
class LabEncoderConfig:
    """An MLP over 50 percentiles and 50 measured-flags; `normalised` is the published one (widths 256, 1024, 1024)."""

    kind: Literal["mlp", "normalised"] = "mlp"
    widths: list[int] = field(default_factory=lambda: [128, 128])


@dataclass
class PerceptionConfig:
    """Cyclic cross-modal attention, then contribution gates (arXiv 2506.18512, section 3).

    Attributes:
        tokens_per_modality: soft tokens that stand for each modality in the prompt.
        residual_scale: weight of the fused signal added to each modality's tokens (the paper's code uses 0.01).
        projector: from features to tokens: a two-layer `mlp`, or `gated`, the published linear layer and gated blocks.
    """

    tokens_per_modality: int = 1
    num_heads: int = 4
    residual_scale: float = 1.0
    projector: Literal["mlp", "gated"] = "mlp"


@dataclass
class LoraSettings:
    """Low-rank adapters on the backbone's linear layers (arXiv 2106.09685); rank 0 trains the backbone itself.

    Attributes:
        alpha: the adapters' product is scaled by alpha / rank.
        dropout: must stay 0 where log-probs of one policy are compared.
        train_embeddings: the embedding table and the output layer learn beside the adapters (new tokens need it).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    train_embeddings: bool = True


@dataclass
class ModelConfig:
    """What is built at the start of a run.

    Attributes:
        init: a Hugging Face folder: a MedTVT model to go on from, whose ecg, cxr, lab and perception the run then has,
            or any plain Llama, with its tokenizer and chat template, to build upon; for a text task any causal language
            model with its tokenizer. None starts fresh; a text task then gets a Llama over bytes.
        init_from: a dotted path to an LlmSource (llm_source.py), which writes `init` where it isn't there yet.
    """

    init: str | None = None
    init_from: str | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    ecg: EcgEncoderConfig = field(default_factory=EcgEncoderConfig)
    cxr: CxrEncoderConfig = field(default_factory=CxrEncoderConfig)
    lab: LabEncoderConfig = field(default_factory=LabEncoderConfig)
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
