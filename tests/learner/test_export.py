"""What is sent to the engines: under their names, adapters merged, nothing that is frozen."""

from __future__ import annotations

import torch
from tiny_policy import PlainEngine
from transformers import LlamaConfig, LlamaForCausalLM

from medtvt_rl.learner.export import export_weights, exported_parameters
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.policy import TextPolicy, add_lora

torch.set_num_threads(1)


def _policy() -> TextPolicy:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return TextPolicy(LlamaForCausalLM(settings))


def _exported(policy: TextPolicy) -> dict[str, torch.Tensor]:
    weights = export_weights(PlainEngine(policy), version=5)
    assert weights is not None and weights.version == 5
    weights.verify()
    return dict(weights.tensors())


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
