"""Turns a published checkpoint into a Hugging Face folder of this project.

Owns: the folder: its configuration, its weights, written as they are converted, and that it appears complete or not at
all. Does not own: the conversion (reference_checkpoint.py), the adapter's files (kept_adapter.py), or what becomes of a
tokenizer (data/token_places.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtvt_rl.data.labs import PERCENTILES_FILE, percentiles_of_table
from medtvt_rl.data.special_tokens import END_OF_TEXT, PUBLISHED_TOKENS, REQUIRED, check_special_tokens
from medtvt_rl.model.config import EcgEncoderConfig, LabEncoderConfig, PerceptionConfig, kept_settings
from medtvt_rl.model.published_layout import LAB_WIDTHS
from medtvt_rl.model.published_sizes import PublishedSizes
from medtvt_rl.model.reference_checkpoint import LayoutError, PublishedCheckpoint, Weight, read_published
from medtvt_rl.model.safetensors_stream import write_safetensors
from medtvt_rl.model.seal import seal

RESIDUAL_SCALE = 0.01
# The published loss leaves out labels of this id, which is that of its padding.
IGNORED_LABEL = 0
SPECIAL_IDS = {"bos_token_id": "<|begin_of_text|>", "eos_token_id": END_OF_TEXT}
STOPS = (END_OF_TEXT, "<|eot_id|>")
# The published model was asked for so many at most.
MAX_ANSWER_TOKENS = 600
SHARD_BYTES = 2 * 1024**3

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was written.

    Attributes:
        num_entries: of the checkpoint.
        num_bytes: of the weights in the folder.
        vocab_size: rows of the embedding table.
        rank: of the low-rank pairs.
        dtype: the widest of the checkpoint.
        film_size: side of the film that the encoder takes, pixels.
        tokens_left_out: of the tokenizer, for which the embedding table has no row; None without a tokenizer.
    """

    num_entries: int
    num_bytes: int
    vocab_size: int
    rank: int
    dtype: str
    film_size: int
    tokens_left_out: tuple[str, ...] | None


def import_reference(
    checkpoint: Path,
    params: Path,
    vit_config: Path,
    out: Path,
    *,
    special_tokens: Mapping[str, int] = PUBLISHED_TOKENS,
    tokenizer: Path | None = None,
    keep_template: bool = False,
    answer_tokens: bool = False,
    keep_adapter: bool = False,
    labs_csv: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Imported:
    """Writes `out`, from which MedTVTForCausalLM.from_pretrained gives the function of the published model.

    Each weight keeps the type that it has in the checkpoint; a merged one takes the wider of its own and its pair's.

    Args:
        special_tokens: token -> id; <ecg>, <cxr>, <lab>, and any others that have ids of their own.
        tokenizer: a Hugging Face folder, whose tokens are given these ids; without it `out` has no tokenizer.
        keep_template: its own chat template and end token stay; otherwise a prompt has the published form.
        answer_tokens: `<think>` and its kin are tokens of the tokenizer; the published model read them as text.
        labs_csv: the table of the training patients, whose percentiles `diagnose` needs to read laboratory values.
        keep_adapter: low-rank pairs go to `out`/adapter, as a peft adapter, and not into the weights.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: a file cannot be used, or `out` holds something. `out` is not touched then; a list of entries that
            is too long for the message is written beside it.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: it exists; remove it, or choose another folder")
    sizes = PublishedSizes.read(params, vit_config)
    source = _source(checkpoint, sizes, out)
    check_special_tokens(special_tokens, source.vocab_size)
    table = None if labs_csv is None else percentiles_of_table(labs_csv).smoothed()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        left_out = None
        ids = {name: special_tokens[token] for name, token in SPECIAL_IDS.items() if token in special_tokens}
        if tokenizer is not None:
            from medtvt_rl.data.token_places import write_tokenizer

            ids, left_out = write_tokenizer(
                tokenizer, partial, special_tokens, source.vocab_size, keep_template, answer_tokens
            )
        stops = [special_tokens[token] for token in STOPS if token in special_tokens]
        stops += [token for name, token in ids.items() if name == "eos_token_id" and stops and token not in stops]
        _write_json(partial / "config.json", {**_config(source, sizes, special_tokens), **ids})
        _write_json(partial / "generation_config.json", {**ids, **({"eos_token_id": stops} if stops else {})})
        num_bytes = _write_weights(partial, source.weights(merge=not keep_adapter), progress)
        if table is not None:
            table.save(partial / PERCENTILES_FILE)
        if keep_adapter:
            from medtvt_rl.model.kept_adapter import write_adapter

            write_adapter(partial, source.pairs(), source.rank, base=out)
        seal(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Imported(
        num_entries=len(source),
        num_bytes=num_bytes,
        vocab_size=source.vocab_size,
        rank=source.rank,
        dtype=_name(source.dtype),
        film_size=sizes.film.image_size,
        tokens_left_out=left_out,
    )


def _source(checkpoint: Path, sizes: PublishedSizes, out: Path) -> PublishedCheckpoint:
    try:
        return PublishedCheckpoint(read_published(checkpoint), sizes)
    except LayoutError as error:
        if not error.listing:
            raise
        path = out.with_name(f"{out.name}.entries.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{error.listing}\n", encoding="utf-8")
        raise ValueError(f"{error} All of them are listed in {path}") from error


def _config(source: PublishedCheckpoint, sizes: PublishedSizes, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Of MedTVTConfig, what differs from its defaults. Written without `transformers`, whose import takes seconds."""
    perception = PerceptionConfig(tokens_per_modality=1, residual_scale=RESIDUAL_SCALE, projector="gated")
    return {
        "architectures": ["MedTVTForCausalLM"],
        "model_type": "medtvt",
        "dtype": _name(source.dtype),
        "vocab_size": source.vocab_size,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_heads,
        "head_dim": sizes.dim // sizes.num_heads,
        "rms_norm_eps": sizes.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "max_position_embeddings": sizes.max_positions,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "placeholder_token_ids": [special_tokens[token] for token in REQUIRED],
        "ignored_label": IGNORED_LABEL,
        "untrained_stand_ins": True,
        "film_crop": "published",
        "max_answer_tokens": MAX_ANSWER_TOKENS,
        "ecg": kept_settings(EcgEncoderConfig(kind="xresnet1d101")),
        "cxr": kept_settings(sizes.film),
        "lab": kept_settings(LabEncoderConfig(kind="normalised", widths=list(LAB_WIDTHS))),
        "perception": kept_settings(perception),
    }


def _write_weights(folder: Path, weights: Sequence[Weight], progress: Progress) -> int:
    """safetensors files of at most SHARD_BYTES (or one tensor); bytes of the weights in all."""
    shards = list(_shards(weights))
    total, done = sum(weight.num_bytes for weight in weights), 0
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for count in write_safetensors(folder / file, shard):
            done += count
            progress(done, total)
        file_of |= {weight.name: file for weight in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        _write_json(folder / "model.safetensors.index.json", index)
    return total


def _shards(weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        if shard and size + weight.num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += weight.num_bytes
    yield shard


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
