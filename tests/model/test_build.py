"""Building a model: fresh, on a plain Llama, from a MedTVT folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import small_config, small_model, small_tokenizer
from tiny_llama import LLAMA3_ROPE, tiny_llama
from transformers import PreTrainedTokenizerFast

from medtvt_rl.model.build import build_model
from medtvt_rl.model.config import LoraSettings, ModelConfig
from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.named_weights import unmerged_weights
from medtvt_rl.model.policy import load_policy


def test_fresh_model_follows_configuration_and_tokenizer(
    model_config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(model_config, tokenizer)
    assert model.config.vocab_size == len(tokenizer) == model.output_weight.shape[0]
    assert model.config.study_placeholders == [3, 3, 4, 4, 5, 5]
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    assert 0.04 < model.output_weight.std().item() < 0.06
    assert all(p.requires_grad for p in model.parameters())


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(("tie", "rope"), [(True, LLAMA3_ROPE), (True, PLAIN_ROPE), (False, PLAIN_ROPE)])
def test_a_plain_llama_becomes_the_backbone_and_learns_new_tokens(
    model_config: ModelConfig, tmp_path: Path, tie: bool, rope: dict[str, object]
) -> None:
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tie, "rope_parameters": rope}
    llama = tiny_llama(20, hidden_size=32, **settings).eval()
    llama.save_pretrained(tmp_path / "llama")
    model_config.init = str(tmp_path / "llama")
    tokenizer = small_tokenizer()
    model = build_model(model_config, tokenizer).eval()
    ids = torch.arange(1, 20)[None]  # long enough for positions to turn far
    ids[0, 2:5] = 10  # no placeholder
    with torch.no_grad():
        found = model(input_ids=ids).logits
        torch.testing.assert_close(found[..., :20], llama(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert found.shape[-1] == len(tokenizer) == model.config.vocab_size
    new = model.get_input_embeddings().weight[20:]
    assert bool(torch.isfinite(new).all()) and new.std().item() > 0
    assert (model.output_weight is model.get_input_embeddings().weight) == tie
    model.save(tmp_path / "medtvt")
    model_config.init = str(tmp_path / "medtvt")
    again = build_model(model_config, tokenizer).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, found)
    assert again.config.rope_parameters == {**again.config.rope_parameters, **rope}
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (4, 2)


def test_the_scaling_of_llama_3_matters_in_the_test_above() -> None:
    """The same weights under either rope say other things at these positions."""
    plain, scaled = (
        tiny_llama(20, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope).eval()
        for rope in (PLAIN_ROPE, LLAMA3_ROPE)
    )
    ids = torch.arange(19)[None]
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - scaled(input_ids=ids).logits).abs().max() > 1e-4


def test_a_medtvt_folder_of_other_sizes_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    small_model(small_config(2), tokenizer).save(tmp_path)
    config = small_config(1)
    config.init = str(tmp_path)
    with pytest.raises(ValueError, match="tokens_per_modality"):
        build_model(config, tokenizer)


def test_what_cannot_be_built_upon_is_refused(model_config: ModelConfig, tmp_path: Path) -> None:
    model_config.init = str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        build_model(model_config, small_tokenizer())

    class NoPlaceholders:
        def get_vocab(self) -> dict[str, int]:
            return {"<ecg>": 3}

    with pytest.raises(ValueError, match="<cxr>, <lab>"):
        build_model(model_config, NoPlaceholders())


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_learn_beside_adapters_and_travel_once(model_config: ModelConfig, tmp_path: Path, tie: bool) -> None:
    tokenizer = small_tokenizer()
    llama = tiny_llama(20, hidden_size=32, num_attention_heads=4, tie_word_embeddings=tie)
    llama.save_pretrained(tmp_path / "llama")
    model_config.init = str(tmp_path / "llama")
    build_model(model_config, tokenizer).save(tmp_path / "medtvt")
    policy = load_policy(tmp_path / "medtvt", lora=LoraSettings(rank=2))
    assert isinstance(policy, MedTVTForCausalLM)
    table = policy.get_input_embeddings().weight
    before = table.detach().clone()
    assert (policy.output_weight is table) == tie
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01)
    ids = torch.tensor([[1, 10, 40, 41]])
    policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(table[40:42], before[40:42])
    sent = dict(unmerged_weights(policy))
    backbone = [name for name, weight in sent.items() if isinstance(weight, torch.Tensor) and "study_tower" not in name]
    embedding, output = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    assert backbone == ([embedding] if tie else [embedding, output])
    policy.save(tmp_path / "trained")
    again = load_policy(tmp_path / "trained")
    with torch.no_grad():
        found, wanted = again(input_ids=ids).logits, policy(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
