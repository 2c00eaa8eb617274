"""The policy: names of weights, adapters and their merge, loading that refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import collate, random_item, small_config, small_model, study_prompt
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import PolicyModel, TextPolicy, add_lora, load_policy
from medtvt_rl.model.token_tree import TokenTree, tree_states
from medtvt_rl.model.tower import set_encoders_trainable

TREE = TokenTree.of([study_prompt(0).token_ids])
ITEMS = collate([random_item(0)])


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> MedTVTForCausalLM:
    return small_model(small_config(), tokenizer)


def hidden(policy: PolicyModel) -> torch.Tensor:
    with torch.no_grad():
        return policy.hidden_states(TREE, ITEMS)


def with_adapters(policy: MedTVTForCausalLM, settings: LoraSettings) -> MedTVTForCausalLM:
    """Adapters that do something: B starts at zero otherwise."""
    add_lora(policy, settings)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


@pytest.mark.parametrize("tie", [True, False])
def test_names_are_those_of_the_folder_tied_weights_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tie: bool
) -> None:
    model = small_model(small_config(tie=tie), tokenizer)
    model.save(tmp_path)
    names = [name for name, _ in named_weights(model)]
    assert len(names) == len(set(names)) and set(names) == set(load_file(tmp_path / "model.safetensors"))
    assert ("language_model.lm_head.weight" in names) is not tie
    assert any(name.endswith("running_var") for name in names)


def test_adapters_are_merged_functionally(model: MedTVTForCausalLM, tmp_path: Path) -> None:
    plain_names = [name for name, _ in named_weights(model)]
    before = hidden(model)
    policy = with_adapters(model, LoraSettings(rank=4, alpha=8.0))
    adapted = hidden(policy)
    assert (adapted - before).abs().max() > 0.01
    raw = {name: tensor.clone() for name, tensor in policy.named_parameters()}
    merged = dict(named_weights(policy))
    assert list(merged) == plain_names
    layer = "language_model.model.layers.0.self_attn.q_proj"
    expected = raw[f"{layer}.base_layer.weight"] + 2.0 * (
        raw[f"{layer}.lora_B.default.weight"] @ raw[f"{layer}.lora_A.default.weight"]
    )
    torch.testing.assert_close(merged[f"{layer}.weight"], expected)
    assert all(torch.equal(raw[name], tensor) for name, tensor in policy.named_parameters())
    policy.save(tmp_path)
    torch.testing.assert_close(hidden(load_policy(tmp_path)), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("train_embeddings", [True, False])
def test_trained_only_leaves_out_what_is_frozen(model: MedTVTForCausalLM, train_embeddings: bool) -> None:
    set_encoders_trainable(model, False)
    policy = with_adapters(model, LoraSettings(rank=2, train_embeddings=train_embeddings))
    names = {name for name, _ in named_weights(policy, trained_only=True)}
    assert not any("_encoder." in name or "layernorm" in name for name in names)
    assert "language_model.model.layers.1.mlp.down_proj.weight" in names and "study_tower.perception.stand_in" in names
    assert ("language_model.model.embed_tokens.weight" in names) is train_embeddings
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_loaded_policy_is_frozen_where_encoders_are_and_takes_adapters(
    model: MedTVTForCausalLM, tmp_path: Path
) -> None:
    model.save(tmp_path)
    policy = load_policy(tmp_path, lora=LoraSettings(rank=2))
    assert isinstance(policy, PolicyModel) and not policy.training
    torch.testing.assert_close(hidden(policy), hidden(model), atol=1e-5, rtol=1e-5)
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learning and not any("_encoder." in name for name in learning)
    assert load_policy(tmp_path, torch.bfloat16).output_weight.dtype == torch.bfloat16


def test_folders_that_do_not_fit_are_refused(model: MedTVTForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        load_policy(tmp_path)
    model.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = weights.pop("study_tower.perception.gate.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate\.weight"):
        load_policy(tmp_path)
    weights["study_tower.perception.gate.weight"] = removed[:, :-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate\.weight"):
        load_policy(tmp_path)


def test_text_policy_has_the_names_of_its_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert isinstance(policy, TextPolicy) and isinstance(policy, PolicyModel)
    assert {name for name, _ in named_weights(policy)} == set(load_file(tmp_path / "model.safetensors"))
    ids = np.array([1, 5, 6])
    tree = TokenTree.of([ids])
    with torch.no_grad():
        logits = policy.hidden_states(tree) @ policy.output_weight.T
        torch.testing.assert_close(logits, policy.model(input_ids=torch.from_numpy(ids)[None]).logits[0])
    with pytest.raises(ValueError, match="no multimodal items"):
        policy.hidden_states(tree, ITEMS)
    add_lora(policy, LoraSettings(rank=2))
    policy.save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with torch.no_grad():
        torch.testing.assert_close(
            load_policy(tmp_path / "merged").hidden_states(tree) @ policy.output_weight.T, logits
        )


class OwnConfig(LlamaConfig):
    model_type = "own_test_model"


class OwnModel(LlamaForCausalLM):
    """A model of one's own that is a policy itself."""

    config_class = OwnConfig

    def hidden_states(self, tree: TokenTree, items: Any = None, item_index: Any = None) -> torch.Tensor:
        return tree_states(self.base_model, tree) + 1.0

    @property
    def output_weight(self) -> torch.Tensor:
        return self.get_output_embeddings().weight

    def save(self, folder: str | Path) -> None:
        self.save_pretrained(folder)


def test_a_model_that_is_a_policy_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    AutoConfig.register("own_test_model", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    own = OwnModel(OwnConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    own.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert isinstance(loaded, OwnModel)
    tree = TokenTree.of([np.array([3, 4, 5], np.int32)])
    with torch.no_grad():
        torch.testing.assert_close(loaded.hidden_states(tree), own.eval().hidden_states(tree))
