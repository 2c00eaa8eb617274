"""The Hugging Face model: placement of study tokens, shared studies, generation, folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small_model import collate, random_item, small_config, small_model, study_prompt
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from medtvt_rl.model.medtvt import MedTVTConfig, MedTVTForCausalLM, place_study_tokens
from medtvt_rl.model.token_tree import TokenTree


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> MedTVTForCausalLM:
    return small_model(small_config(), tokenizer)


def ids_of(*seeds: int) -> Tensor:
    return torch.stack([torch.from_numpy(study_prompt(seed).token_ids).long() for seed in seeds])


def test_study_tokens_replace_the_first_placeholders_only() -> None:
    ids = torch.tensor([[1, 3, 4, 5, 9, 4], [1, 9, 3, 4, 5, 9]])
    embeddings = torch.zeros(2, 6, 2)
    tokens = torch.arange(1.0, 13.0).view(2, 3, 2)
    placed = place_study_tokens(ids, embeddings, tokens, [3, 4, 5])
    assert torch.equal(placed[0, 1:4], tokens[0]) and torch.equal(placed[1, 2:5], tokens[1])
    assert placed[0, 4:].abs().sum() == 0 and placed[1, :2].abs().sum() == 0


def test_study_tokens_follow_the_order_of_the_prompt() -> None:
    ids = torch.tensor([[1, 5, 3, 9, 4, 3], [1, 3, 4, 5, 9, 9], [4, 9, 5, 1, 3, 9]])
    tokens = torch.arange(1.0, 19.0).view(3, 3, 2)
    placed = place_study_tokens(ids, torch.zeros(3, 6, 2), tokens, [3, 4, 5])
    for row, (ecg, film, labs) in enumerate([(2, 4, 1), (1, 2, 3), (4, 0, 2)]):
        assert torch.equal(placed[row, [ecg, film, labs]], tokens[row])
    several = torch.tensor([[5, 5, 3, 3, 4, 4]])
    tokens = torch.arange(1.0, 7.0).view(1, 6, 1)
    placed = place_study_tokens(several, torch.zeros(1, 6, 1), tokens, [3, 3, 4, 4, 5, 5])
    assert placed.flatten().tolist() == [5, 6, 1, 2, 3, 4]


@pytest.mark.parametrize("row", [[1, 3, 4, 9, 9], [1, 4, 3, 3, 5], [1, 3, 3, 4, 5]])
def test_missing_or_doubled_placeholders_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        place_study_tokens(torch.tensor([row]), torch.zeros(1, 5, 2), torch.ones(1, 3, 2), [3, 4, 5])


@torch.no_grad()
def test_item_index_equals_repeating_the_studies(model: MedTVTForCausalLM) -> None:
    ids, index = ids_of(0, 1, 2, 3), torch.tensor([1, 0, 1, 1])
    two = [random_item(0), random_item(1, (True, False, True))]
    tree = TokenTree.of(list(ids.numpy()))
    shared = model.hidden_states(tree, collate(two), index)
    repeated = model.hidden_states(tree, collate([two[i] for i in index.tolist()]))
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="item_index"):
        model.hidden_states(tree, collate(two))


@torch.no_grad()
def test_padding_changes_nothing_even_if_its_id_is_a_placeholder(model: MedTVTForCausalLM) -> None:
    ids, items = study_prompt(0, length=4).token_ids, collate([random_item(0), random_item(1)])
    alone = model.hidden_states(TokenTree.of([ids]), {name: value[:1] for name, value in items.items()})
    padded = TokenTree.of([ids, study_prompt(1, length=9).token_ids])
    padded = dataclasses.replace(padded, stem_ids=padded.stem_ids.masked_fill(padded.stem_mask == 0, 3))
    width = padded.stem_ids.shape[1]
    torch.testing.assert_close(
        model.hidden_states(padded, items)[width - len(ids) : width], alone, atol=1e-5, rtol=1e-5
    )


def test_forward_gives_the_logits_of_hidden_states_and_a_loss(model: MedTVTForCausalLM) -> None:
    ids, items = ids_of(0, 1), collate([random_item(0), random_item(1)])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **items)
    hidden = model.hidden_states(TokenTree.of(list(ids.numpy())), items)
    torch.testing.assert_close(output.logits.flatten(0, 1), hidden @ model.output_weight.T)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@torch.no_grad()
def test_generate_reads_each_study_once_and_continues_greedily(model: MedTVTForCausalLM) -> None:
    ids, items = ids_of(0, 1), collate([random_item(0), random_item(1)])
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **items, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    for step in range(ids.shape[1], answer.shape[1]):
        prefix = answer[:, :step]
        logits = model(input_ids=prefix, **items).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        assert torch.equal(logits.argmax(-1), answer[:, step])
    several = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **items,
        max_new_tokens=3,
        min_new_tokens=3,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
    )
    assert several.shape == (6, ids.shape[1] + 3)


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_folder_round_trip(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tie: bool) -> None:
    model = small_model(small_config(tie=tie), tokenizer)
    model.save(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MedTVTConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MedTVTForCausalLM) and not loaded.training
    ids, items = ids_of(0), collate([random_item(0, (True, True, False))])
    torch.testing.assert_close(model(input_ids=ids, **items).logits, loaded(input_ids=ids, **items).logits)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.output_weight is loaded.get_input_embeddings().weight) == tie


def test_default_model_has_no_dropout(model: MedTVTForCausalLM) -> None:
    active = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    attention = [m.dropout for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert not active and attention == [0.0] and model.config.attention_dropout == 0
