"""The entries of a checkpoint in the layout of the published MedTVT-R1 implementation (arXiv 2506.18512).

Owns: every entry's name, its shape, and the weight of this model that it becomes. Does not own: the sizes
(published_sizes.py), or the tensors (reference_checkpoint.py). Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from medtvt_rl.model.config import CxrEncoderConfig
from medtvt_rl.model.published_sizes import PublishedSizes

Kind = Literal["copied", "linear", "rotary", "low_rank", "copy", "unused"]
Shape = tuple[int, ...]

ECG_STAGES = ((3, 64), (4, 128), (23, 128), (3, 192))
ECG_CHANNELS, ECG_FEATURES, LAB_WIDTHS, NUM_LAB_INPUTS = 768, 1024, (256, 1024, 1024), 100
PROJECTORS = {"ecg": ("ecg_xresnet1d101", ECG_FEATURES), "cxr": ("cxr_vit", None), "lab": ("lab_fc", LAB_WIDTHS[-1])}
LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
# Linear layers without a bias in the published model; a Hugging Face Llama has one on all of q, k, v, o or on none.
WITHOUT_BIAS = ("attention.wk", "attention.wv")
ROTARY = ("attention.wq", "attention.wk")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedEntry:
    """One entry.

    Attributes:
        shape: () is a scalar.
        target: the weight of this model that it becomes, or is added to; None where it becomes none.
        kind: `copied` as it is; `linear`, with a low-rank pair; `rotary`: that, and its rows are reordered; `low_rank`:
            one of a pair; `copy`: stored a second time; `unused` by the published model itself.
    """

    shape: Shape
    target: str | None
    kind: Kind


def published_layout(sizes: PublishedSizes, vocab_size: int, rank: int) -> dict[str, PublishedEntry]:
    """Every entry that a checkpoint of these sizes holds, by its name.

    Args:
        vocab_size: rows of the embedding table.
        rank: of the low-rank pairs.
    """
    parts = (_ecg(), _film_entries(sizes.film), _labs(), _perception(sizes), _llama(sizes, vocab_size, rank))
    return {name: entry for part in parts for name, entry in part}


def encoder_layout(modality: str, film: CxrEncoderConfig) -> dict[str, PublishedEntry]:
    """The entries of one encoder, those that pool its output included."""
    return dict({"ecg": _ecg, "cxr": lambda: _film_entries(film), "lab": _labs}[modality]())


Named = Iterator[tuple[str, PublishedEntry]]


def _entry(name: str, shape: Shape, target: str | None, kind: Kind = "copied") -> tuple[str, PublishedEntry]:
    return name, PublishedEntry(shape=shape, target=target, kind=kind)


def _affine(name: str, target: str, shape: Shape, bias: bool = True) -> Named:
    """weight and bias, those of a norm where the shape has one dimension."""
    yield _entry(f"{name}.weight", shape, f"{target}.weight")
    if bias:
        yield _entry(f"{name}.bias", shape[:1], f"{target}.bias")


def _conv_norm(name: str, target: str, shape: Shape, kind: Kind = "copied") -> Named:
    """A convolution without bias and its BatchNorm."""
    yield _entry(f"{name}.0.weight", shape, f"{target}.0.weight", kind)
    for last in ("weight", "bias", "running_mean", "running_var"):
        yield _entry(f"{name}.1.{last}", shape[:1], f"{target}.1.{last}", kind)
    yield _entry(f"{name}.1.num_batches_tracked", (), f"{target}.1.num_batches_tracked", kind)


def _ecg() -> Named:
    ours = "study_tower.ecg_encoder"
    for number, (outputs, inputs) in enumerate(((32, 12), (32, 32), (64, 32))):
        yield from _conv_norm(f"ecg_encoder.{number}", f"{ours}.stem.{number}", (outputs, inputs, 5))
    inputs = 64
    for stage, (depth, inner) in enumerate(ECG_STAGES):
        for block in range(depth):
            name, target = f"ecg_encoder.{4 + stage}.{block}", f"{ours}.stages.{stage}.{block}"
            outputs = 4 * inner
            shapes = ((inner, inputs, 1), (inner, inner, 5), (outputs, inner, 1))
            # The published block keeps its convolutions under two names.
            names: tuple[tuple[str, Kind], ...] = (("convs", "copied"), ("convpath.0", "copy"))
            for within, kind in names:
                for number, shape in enumerate(shapes):
                    yield from _conv_norm(f"{name}.{within}.{number}", f"{target}.convs.{number}", shape, kind)
            if inputs != outputs:
                # Where the block strides, the pooling comes first.
                place = int(stage > 0 and block == 0)
                yield from _conv_norm(f"{name}.idpath.{place}", f"{target}.shortcut.{place}", (outputs, inputs, 1))
            inputs = outputs
    for source, width in (("ih", ECG_CHANNELS), ("hh", ECG_FEATURES)):
        rnn: dict[str, Shape] = {"weight": (ECG_FEATURES, width), "bias": (ECG_FEATURES,)}
        for last, size in rnn.items():
            yield _entry(f"ecg_xresnet1d101_rnn.{last}_{source}_l0", size, f"{ours}.rnn.{last}_{source}_l0")
    yield from _affine("ecg_xresnet1d101_attention", f"{ours}.attention", (1, ECG_FEATURES))


def _film_entries(film: CxrEncoderConfig) -> Named:
    ours, size, inner = "study_tower.cxr_encoder.vit", film.hidden_size, film.intermediate_size
    num_tokens = (film.image_size // film.patch_size) ** 2 + 1
    for name, shape in (("cls_token", (1, 1, size)), ("position_embeddings", (1, num_tokens, size))):
        yield _entry(f"vit_model.embeddings.{name}", shape, f"{ours}.embeddings.{name}")
    patches = "embeddings.patch_embeddings.projection"
    yield from _affine(
        f"vit_model.{patches}", f"{ours}.{patches}", (size, film.num_channels, film.patch_size, film.patch_size)
    )
    layers: dict[str, tuple[str, Shape]] = {
        "attention.attention.query": ("attention.q_proj", (size, size)),
        "attention.attention.key": ("attention.k_proj", (size, size)),
        "attention.attention.value": ("attention.v_proj", (size, size)),
        "attention.output.dense": ("attention.o_proj", (size, size)),
        "layernorm_before": ("layernorm_before", (size,)),
        "layernorm_after": ("layernorm_after", (size,)),
        "intermediate.dense": ("mlp.fc1", (inner, size)),
        "output.dense": ("mlp.fc2", (size, inner)),
    }
    for layer in range(film.num_layers):
        for name, (target, sizes) in layers.items():
            yield from _affine(f"vit_model.encoder.layer.{layer}.{name}", f"{ours}.layers.{layer}.{target}", sizes)
    yield from _affine("vit_model.layernorm", f"{ours}.layernorm", (size,))
    yield _entry("vit_model.pooler.dense.weight", (size, size), None, "unused")
    yield _entry("vit_model.pooler.dense.bias", (size,), None, "unused")
    yield from _affine("cxr_vit_agg", "study_tower.cxr_encoder.aggregate", (1, num_tokens, 1))


def _labs() -> Named:
    for number, (inputs, outputs) in enumerate(zip((NUM_LAB_INPUTS, *LAB_WIDTHS), LAB_WIDTHS)):
        target = f"study_tower.lab_encoder.layers.{2 * number}"
        yield from _affine(f"lab_encoder.fc{number + 1}", target, (outputs, inputs))
    yield from _affine("lab_encoder.layer_norm", "study_tower.lab_encoder.norm", LAB_WIDTHS[-1:])


def _perception(sizes: PublishedSizes) -> Named:
    ours, dim = "study_tower.perception", sizes.dim
    for modality, (name, width) in PROJECTORS.items():
        target = f"{ours}.projectors.{modality}"
        yield from _affine(f"{name}_proj", f"{target}.linear", (dim, width or sizes.film.hidden_size))
        for block in (1, 2, 3):
            for part in ("norm", "f1", "f2", "f3"):
                shape = (dim,) if part == "norm" else (dim, dim)
                yield from _affine(f"{name}_{part}_{block}", f"{target}.blocks.{block - 1}.{part}", shape, bias=False)
    attention = "CyclicCrossModalAttention.multihead_attention"
    yield _entry(f"{attention}.in_proj_weight", (3 * dim, dim), f"{ours}.attention.in_proj_weight")
    yield _entry(f"{attention}.in_proj_bias", (3 * dim,), f"{ours}.attention.in_proj_bias")
    yield from _affine(f"{attention}.out_proj", f"{ours}.attention.out_proj", (dim, dim))
    yield from _affine("CyclicCrossModalAttention.layer_norm", f"{ours}.norm", (dim,))
    yield from _affine("DynamicWeighting.gate", f"{ours}.gate", (3, 3 * dim))


def _llama(sizes: PublishedSizes, vocab_size: int, rank: int) -> Named:
    dim, inner = sizes.dim, sizes.ffn_size
    yield _entry("llama.tok_embeddings.weight", (vocab_size, dim), "language_model.model.embed_tokens.weight")
    yield _entry("llama.norm.weight", (dim,), "language_model.model.norm.weight")
    yield _entry("llama.output.weight", (vocab_size, dim), "language_model.lm_head.weight")
    for layer in range(sizes.num_layers):
        name, target = f"llama.layers.{layer}", f"language_model.model.layers.{layer}"
        yield _entry(f"{name}.attention_norm.weight", (dim,), f"{target}.input_layernorm.weight")
        yield _entry(f"{name}.ffn_norm.weight", (dim,), f"{target}.post_attention_layernorm.weight")
        yield _entry(f"{name}.attention.gate", (1, sizes.num_heads, 1, 1), None, "unused")
        for linear, ours in LINEARS.items():
            outputs = inner if linear.endswith(("w1", "w3")) else dim
            inputs = inner if linear.endswith("w2") else dim
            weight, kind = f"{target}.{ours}.weight", "rotary" if linear in ROTARY else "linear"
            yield _entry(f"{name}.{linear}.weight", (outputs, inputs), weight, kind)  # type: ignore[arg-type]
            if linear not in WITHOUT_BIAS:
                bias: Kind = "rotary" if linear in ROTARY else "copied"
                yield _entry(f"{name}.{linear}.bias", (outputs,), f"{target}.{ours}.bias", bias)
            down, up = low_rank_names(f"{name}.{linear}")
            yield _entry(down, (rank, inputs), weight, "low_rank")
            yield _entry(up, (outputs, rank), weight, "low_rank")


def low_rank_names(linear: str) -> tuple[str, str]:
    """The pair of a linear layer: what is applied first [r, in], and second [out, r]."""
    block, _, name = linear.removesuffix(".weight").rpartition(".")
    return f"{block}.lora_{name}_l1.weight", f"{block}.lora_{name}_l2.weight"
