"""Log-probs against log_softmax, their gradients, and the batch they are computed over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_policy import VOCABULARY, TinyItems, TinyPolicy

from medtvt_rl.learner.scoring import (
    ScoredSequence,
    ScoringModule,
    build_batch,
    load_items,
    score_sequences,
    token_logprobs,
)
from medtvt_rl.model.token_tree import TokenTree

torch.set_num_threads(1)


def _random(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, (count,), generator=generator)


@pytest.mark.parametrize("count", [1, 128, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_logprobs_and_gradients_are_those_of_log_softmax(count: int, temperature: float) -> None:
    hidden, weight, targets = _random(count)
    scale = torch.linspace(-1, 1, count)
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature)
    expected = torch.log_softmax(hidden @ weight.T / temperature, dim=-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5, rtol=1e-6)
    found = torch.autograd.grad((logprobs * scale).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_agrees_to_1e6_in_unit_range() -> None:
    hidden, weight, targets = _random(64)
    logprobs, _ = token_logprobs(hidden * 0.1, weight, targets, 1.0)
    expected = torch.log_softmax((hidden * 0.1).double() @ weight.double().T, dim=-1).gather(1, targets[:, None])[:, 0]
    assert float((logprobs.double() - expected).detach().abs().max()) < 1e-6


def test_entropy_is_that_of_the_distribution_and_has_no_gradient() -> None:
    hidden, weight, targets = _random(200)
    _, entropy = token_logprobs(hidden, weight, targets, 1.3)
    expected = torch.distributions.Categorical(logits=hidden @ weight.T / 1.3).entropy()
    assert torch.allclose(entropy, expected, atol=1e-5)
    assert not entropy.requires_grad


def test_a_frozen_output_embedding_gets_no_gradient() -> None:
    hidden, weight, targets = _random(5)
    token_logprobs(hidden, weight.detach(), targets, 1.0)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_rows_give_no_logprobs_and_a_zero_gradient() -> None:
    hidden, weight, targets = _random(0)
    token_logprobs(hidden, weight, targets, 1.0)[0].sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) == 0.0


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature: got 0"):
        token_logprobs(*_random(3), 0.0)


def _sequences(count: int) -> list[ScoredSequence]:
    rng = np.random.default_rng(1)
    return [
        ScoredSequence(
            prompt_ids=rng.integers(0, VOCABULARY, 2 + i % 3),
            completion_ids=rng.integers(0, VOCABULARY, 1 + (5 * i) % 7),
            item_id=f"item{i // 2}",
        )
        for i in range(count)
    ]


def test_micro_batches_and_padding_change_no_logprob() -> None:
    policy, sequences = TinyPolicy(), _sequences(9)
    alone = [score_sequences(policy, [s], TinyItems(), 1.0, 100)[0] for s in sequences]
    for budget in (12, 30, 1000):
        together = score_sequences(policy, sequences, TinyItems(), 1.0, budget)
        for a, b in zip(alone, together):
            assert torch.allclose(a, b, atol=1e-6)


def test_scores_are_of_the_completion_tokens_in_place() -> None:
    policy, sequence = TinyPolicy(), _sequences(3)[2]
    tokens = np.concatenate([sequence.prompt_ids, sequence.completion_ids])
    items, index = load_items([sequence.item_id], TinyItems(), torch.float32)
    logits = policy.hidden_states(TokenTree.of([tokens]), items, index) @ policy.output_weight.T
    logprobs = torch.log_softmax(logits, dim=-1)
    start = len(sequence.prompt_ids)
    expected = [float(logprobs[start - 1 + t, token]) for t, token in enumerate(sequence.completion_ids)]
    found = score_sequences(policy, [sequence], TinyItems(), 1.0, 100)[0]
    assert np.allclose(found.numpy(), expected, atol=1e-6)
    assert not found.requires_grad


def test_an_item_is_loaded_once_per_micro_batch() -> None:
    items = TinyItems()
    batch = build_batch(_sequences(4), items)
    assert items.asked == ["item0", "item1"]
    assert batch.item_index is not None and batch.item_index.tolist() == [0, 0, 1, 1]


def test_a_prompt_with_its_item_is_a_stem_once() -> None:
    first, second = _sequences(2)
    same = dataclasses.replace(second, prompt_ids=first.prompt_ids.astype(np.int32))
    batch = build_batch([first, dataclasses.replace(first, item_id="item7"), same], TinyItems())
    assert batch.tree.stem_of.tolist() == [0, 1, 0] and len(batch.tree.stem_ids) == 2
    assert batch.item_index is not None and batch.item_index.tolist() == [0, 1]
    assert len(build_batch([first, second], TinyItems()).tree.stem_ids) == 2


@torch.no_grad()
def test_whole_sequences_as_stems_score_the_same() -> None:
    sequences, module = _with_empty(_sequences(6)), ScoringModule(TinyPolicy())
    shared = module(build_batch(sequences, TinyItems()), 1.0)
    whole = build_batch(sequences, TinyItems(), share_prompts=False)
    assert len(whole.tree.stem_ids) == 6 and len(whole.tree.branch_ids) == 0
    for a, b in zip(shared, module(whole, 1.0)):
        assert torch.allclose(a, b, atol=1e-6)


def _with_empty(sequences: list[ScoredSequence]) -> list[ScoredSequence]:
    return [dataclasses.replace(sequences[0], completion_ids=sequences[0].completion_ids[:0]), *sequences[1:]]


def test_completions_without_tokens_score_nothing() -> None:
    sequences = _with_empty(_sequences(3))
    policy = TinyPolicy()
    assert [len(s) for s in score_sequences(policy, sequences, TinyItems(), 1.0, 100)] == [0, 6, 4]
    nothing = score_sequences(policy, sequences[:1], TinyItems(), 1.0, 100, grad=True)[0]
    nothing.sum().backward()
    assert len(nothing) == 0 and float(policy.embedding.weight.grad.abs().max()) == 0.0


def test_items_without_a_source_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 1 sequences name an item"):
        build_batch(_sequences(1), None)


def test_spread_puts_values_where_the_mask_is() -> None:
    batch = build_batch(_sequences(3), TinyItems())
    assert batch.mask().sum(dim=1).tolist() == list(batch.lengths)
    values = torch.arange(1.0, len(batch.targets) + 1)
    assert torch.equal(batch.spread(values)[batch.mask()], values)
