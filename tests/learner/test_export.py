"""What is sent to the engines, in each of the ways: under their names, and nothing that they have already."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_policy import PlainEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import small_config, small_model, small_tokenizer
from tiny_llama import tiny_llama

from medtvt_rl.learner.export import export_weights, exported_parameters
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import TextPolicy, add_lora
from medtvt_rl.model.tower import set_encoders_trainable
from medtvt_rl.rollout.config import Sent
from medtvt_rl.weights import WeightBuffer

ADAPTED_PER_LAYER = 7

torch.set_num_threads(1)


def _policy() -> TextPolicy:
    return TextPolicy(tiny_llama(32, num_hidden_layers=1, tie_word_embeddings=True))


def packed(policy: Any, send: Sent = "merged") -> WeightBuffer:
    weights = export_weights(PlainEngine(policy), version=5, send=send)
    assert weights is not None and weights.version == 5
    weights.verify()
    return weights


def _exported(policy: TextPolicy) -> dict[str, torch.Tensor]:
    return dict(packed(policy).tensors())


def tri_modal(train_embeddings: bool, tie: bool = True) -> Any:
    """Adapters that do something; of the tower the perception layer and the film encoder learn."""
    policy = small_model(small_config(tie=tie), small_tokenizer())
    set_encoders_trainable(policy, False)
    policy.study_tower.cxr_encoder.requires_grad_(True)
    add_lora(policy, LoraSettings(rank=2, alpha=3.0, train_embeddings=train_embeddings))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return policy


def test_a_tied_output_layer_is_sent_once_and_frozen_weights_are_not_sent() -> None:
    policy = _policy()
    policy.model.model.norm.weight.requires_grad_(False)
    names = set(_exported(policy))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "model.norm.weight" not in names


def test_adapters_arrive_merged_and_the_policy_keeps_them_apart() -> None:
    policy = _policy()
    original = policy.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    add_lora(policy, LoraSettings(rank=2, alpha=4.0, train_embeddings=False))
    layer = policy.model.model.layers[0].self_attn.q_proj
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    with torch.no_grad():
        up.normal_()
    exported = _exported(policy)
    expected = original + 2.0 * up.detach() @ down.detach()
    assert torch.allclose(exported["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-6)
    assert torch.equal(layer.base_layer.weight, original)
    assert len(exported) == 7 and not any("lora" in name for name in exported)


def test_a_sharded_engine_gathers_the_frozen_weights_beneath_adapters() -> None:
    policy = _policy()
    add_lora(policy, LoraSettings(rank=2, train_embeddings=False))
    gathered = {id(parameter) for parameter in exported_parameters(policy)}
    layer = policy.model.model.layers[0].mlp.up_proj
    assert id(layer.base_layer.weight) in gathered and id(layer.lora_A["default"].weight) in gathered
    assert id(policy.model.model.norm.weight) not in gathered
    fewer = {id(parameter) for parameter in exported_parameters(policy, "trainable")}
    assert fewer == gathered - {id(m.base_layer.weight) for m in policy.modules() if hasattr(m, "lora_A")}
    assert len(exported_parameters(policy, "full")) == len(list(policy.parameters()))


def test_each_way_sends_less_than_the_next() -> None:
    adapter = packed(tri_modal(train_embeddings=False), "adapter")
    policy = tri_modal(train_embeddings=True)
    sizes = [adapter.data.nbytes] + [packed(policy, send).data.nbytes for send in ("trainable", "merged", "full")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


@pytest.mark.parametrize("send", ["adapter", "trainable"])
def test_adapters_travel_apart_and_what_is_beneath_them_stays(send: Sent) -> None:
    policy = tri_modal(train_embeddings=send == "trainable")
    weights = packed(policy, send)
    low_ranks, whole = dict(weights.low_ranks()), dict(weights.tensors())
    assert len(low_ranks) == 2 * ADAPTED_PER_LAYER and not set(low_ranks) & set(whole)
    layer = policy.language_model.model.layers[1].mlp.down_proj
    sent = low_ranks["language_model.model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(sent.down, layer.lora_A["default"].weight) and torch.equal(
        sent.up, layer.lora_B["default"].weight
    )
    assert sent.scale == 1.5 and sent.dtype == torch.float32
    outside = {name for name in whole if name.startswith("language_model.")}
    assert outside == ({"language_model.model.embed_tokens.weight"} if send == "trainable" else set())


@pytest.mark.parametrize("send", get_args(Sent))
@pytest.mark.parametrize("tie", [True, False])
def test_every_way_sends_the_weights_that_the_policy_has_now(send: Sent, tie: bool) -> None:
    """Whole or to be merged: each weight that learns, once; the statistics of those that learn, and of no other."""
    policy = tri_modal(train_embeddings=send != "adapter", tie=tie)
    start = {name: tensor.clone() for name, tensor in named_weights(policy)}
    beneath = {
        name.replace(".base_layer.", "."): p.detach() for name, p in policy.named_parameters() if ".base_layer." in name
    }
    weights = packed(policy, send)
    merged = {name: low_rank.added_to(beneath[name]) for name, low_rank in weights.low_ranks()}
    found = dict(weights.tensors()) | merged
    assert len(found) == len(weights.index) + len(weights.adapters), "each once"
    assert all(torch.equal(tensor, start[name]) for name, tensor in found.items())
    learning = {name for name, _ in named_weights(policy, trained_only=True)}
    assert set(found) == (set(start) if send == "full" else learning)
    statistics = {name.split(".")[1] for name in found if name.endswith("running_mean")}
    assert statistics == ({"cxr_encoder", "ecg_encoder"} if send == "full" else {"cxr_encoder"})
    assert ("language_model.lm_head.weight" in found) is (not tie and send != "adapter")


def test_without_adapters_all_that_learns_is_the_same_sent_either_way() -> None:
    policy = _policy()
    merged, trainable = packed(policy, "merged"), packed(policy, "trainable")
    assert merged.index == trainable.index and merged.checksum == trainable.checksum and not trainable.adapters
