"""Adapters merged into a model folder's weights: bitwise what the learner merges, from every kind of folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import small_config, small_model, small_tokenizer

from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.named_weights import named_weights, unmerged_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.rollout.base_weights import BaseWeights, merged_weights
from medtvt_rl.weights import LowRank, pack_weights

torch.set_num_threads(1)
CPU = torch.device("cpu")


def text_model(folder: Path, dtype: torch.dtype, **options: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=72, intermediate_size=200, num_hidden_layers=2, num_attention_heads=3
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **options)


def adapted(folder: Path, dtype: torch.dtype, rank: int = 5) -> Any:
    policy = load_policy(folder, dtype, LoraSettings(rank=rank, alpha=11.0, train_embeddings=False))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return policy


def compare(folder: Path, policy: Any) -> None:
    """The engine's merge, of a buffer that has travelled, against the learner's."""
    expected = dict(named_weights(policy))
    buffer = pack_weights(1, unmerged_weights(policy))
    merged = dict(merged_weights(folder, buffer.low_ranks(), CPU))
    assert len(merged) == 14
    for name, tensor in merged.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("folder_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learner_dtype", [torch.float32, torch.bfloat16])
def test_the_merge_is_bitwise_the_learners_whatever_the_types(
    tmp_path: Path, folder_dtype: torch.dtype, learner_dtype: torch.dtype
) -> None:
    text_model(tmp_path, folder_dtype)
    compare(tmp_path, adapted(tmp_path, learner_dtype))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_merge_does_not_depend_on_the_number_of_threads(tmp_path: Path, two_threads: None, rank: int) -> None:
    text_model(tmp_path, torch.float32)
    policy = adapted(tmp_path, torch.float32, rank)
    merged = dict(merged_weights(tmp_path, pack_weights(1, unmerged_weights(policy)).low_ranks(), CPU))
    torch.set_num_threads(1)
    assert all(torch.equal(merged[name], tensor) for name, tensor in named_weights(policy) if name in merged)


def test_a_sharded_folder(tmp_path: Path) -> None:
    text_model(tmp_path, torch.float32, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    compare(tmp_path, adapted(tmp_path, torch.float32))


@pytest.mark.parametrize("tie", [True, False])
def test_a_tri_modal_folder(tmp_path: Path, tie: bool) -> None:
    small_model(small_config(tie=tie), small_tokenizer()).save(tmp_path)
    compare(tmp_path, adapted(tmp_path, torch.float32))


def test_weights_are_views_on_the_file(tmp_path: Path) -> None:
    text_model(tmp_path, torch.float32)
    weight = BaseWeights(tmp_path)["model.layers.0.mlp.up_proj.weight"]
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    bounds = [tuple(int(bound, 16) for bound in words[0].split("-")) for words in ranges]
    assert any(first <= weight.data_ptr() < end for first, end in bounds)


def test_folders_that_cannot_serve_are_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .* set weights\.send=merged"):
        BaseWeights(tmp_path)
    text_model(tmp_path, torch.float32)
    unknown = LowRank(down=torch.zeros(1, 2), up=torch.zeros(2, 1), scale=1.0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"has no weight 'x\.weight', for which an adapter came"):
        list(merged_weights(tmp_path, [("x.weight", unknown)], CPU))
