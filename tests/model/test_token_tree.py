"""Completions that share their prompt against sequences that run alone: log-probs, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_model import NUM_WORDS, SPECIAL, random_item, small_config, small_model, study_prompt
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from medtvt_rl.algorithm.packing import micro_batches
from medtvt_rl.learner.scoring import ScoredSequence, ScoringModule, build_batch, load_items, score_sequences
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.policy import TextPolicy, add_lora
from medtvt_rl.model.token_tree import TokenTree

torch.set_num_threads(1)
VOCABULARY = len(SPECIAL) + NUM_WORDS
LONGEST = 17
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# The window of 5 is shorter than prompts and completions.
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=33, bos_token_id=1, eos_token_id=2
    ),
}


class StudyItems:
    """Studies by their id, some with a modality missing."""

    def get(self, item_id: str) -> dict[str, np.ndarray[Any, Any]]:
        seed = int(item_id[1:])
        return random_item(seed, (True, seed % 2 == 0, seed % 3 != 1))


def study_policy(tokenizer: PreTrainedTokenizerFast) -> MedTVTForCausalLM:
    """Weights so small that rounding stays below what is checked."""
    policy = small_model(small_config(), tokenizer)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    return policy


def text_policy(config: Any, attention: str = "sdpa") -> TextPolicy:
    """Weights large enough for every token to matter."""
    torch.manual_seed(0)
    policy = TextPolicy(AutoModelForCausalLM.from_config(config, attn_implementation=attention)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return policy


def groups(prompts: list[np.ndarray[Any, Any]], sizes: list[int], items: bool = False) -> list[ScoredSequence]:
    """Completions of 0 to LONGEST tokens, one of them of each extreme; any token occurs, placeholders too."""
    rng = np.random.default_rng(1)
    sequences = []
    for place, (prompt, size) in enumerate(zip(prompts, sizes)):
        for index in range(size):
            length = {0: LONGEST, 1: 0, 2: 1}.get(index, int(rng.integers(0, LONGEST + 1)))
            sequences.append(
                ScoredSequence(
                    prompt_ids=prompt,
                    completion_ids=rng.integers(0, VOCABULARY, length),
                    item_id=f"s{place}" if items else None,
                )
            )
    order = rng.permutation(len(sequences))
    return [sequences[i] for i in order]


def text_groups(sizes: list[int]) -> list[ScoredSequence]:
    """Prompts of 1 to 16 tokens."""
    rng = np.random.default_rng(0)
    lengths = [7, 1, 16, 4, 11]
    return groups([rng.integers(0, VOCABULARY, length) for length in lengths[: len(sizes)]], sizes)


def study_groups(sizes: list[int]) -> list[ScoredSequence]:
    """Prompts with placeholders, of 8 tokens and more."""
    return groups([study_prompt(seed, length=1 + 3 * seed).token_ids for seed in range(len(sizes))], sizes, items=True)


def alone(policy: TextPolicy | MedTVTForCausalLM, sequence: ScoredSequence) -> Tensor:
    """Log-probs [T] of one sequence by the model's own forward pass, with neither padding nor cache."""
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids])).long()[None]
    if isinstance(policy, TextPolicy):
        logits = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state @ policy.output_weight.T
    else:
        stacked, _ = load_items([sequence.item_id], StudyItems(), torch.float32)
        assert stacked is not None
        logits = policy(input_ids=ids, use_cache=False, **stacked).logits
    start = len(sequence.prompt_ids)
    return logits[0, start - 1 : -1].float().log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]


Scores = Callable[[], list[Tensor]]


def logprobs_and_gradients(policy: torch.nn.Module, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a random weighting of all log-probs."""
    policy.zero_grad()
    logprobs = torch.cat(scores())
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(2))
    (logprobs * weights).sum().backward()
    grads = {name: p.grad.float().clone() for name, p in policy.named_parameters() if p.grad is not None}
    return logprobs.detach(), grads


def check(policy: TextPolicy | MedTVTForCausalLM, sequences: list[ScoredSequence], token_budget: int = 100_000) -> None:
    """Log-probs to 1e-5, and the gradient of every parameter that trains to 1e-5 of its norm; where one cancels, to
    1e-6 of the norm of all.
    """
    expected, wanted = logprobs_and_gradients(policy, lambda: [alone(policy, s) for s in sequences])
    found, grads = logprobs_and_gradients(
        policy, lambda: score_sequences(policy, sequences, StudyItems(), 1.0, token_budget, grad=True)
    )
    assert float((found - expected).abs().max()) < 1e-5
    assert grads.keys() == wanted.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    overall = float(torch.cat([grad.flatten() for grad in wanted.values()]).norm())
    for name, grad in grads.items():
        assert float((grad - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()) + 1e-6 * overall, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", MODELS)
def test_text_models_score_as_if_each_sequence_ran_alone(model: str, attention: str) -> None:
    check(text_policy(MODELS[model], attention), text_groups([5, 1, 3, 1, 2]))


@pytest.mark.parametrize("sizes", [[1], [2], [33], [1, 1, 1], [33, 1, 8]])
def test_any_size_of_group(sizes: list[int]) -> None:
    check(text_policy(MODELS["llama"]), text_groups(sizes))


def test_padding_beside_a_long_prompt_stays_within_the_positions_of_the_model() -> None:
    rng = np.random.default_rng(0)
    lengths = [(32, 1), (30, 3), (2, 31), (33, 0)]
    check(
        text_policy(MODELS["gpt2"]),
        [
            ScoredSequence(prompt_ids=rng.integers(0, VOCABULARY, p), completion_ids=rng.integers(0, VOCABULARY, c))
            for p, c in lengths
        ],
    )


def test_groups_cut_by_the_token_budget() -> None:
    sequences = text_groups([9, 1, 12, 2, 4])
    assert len(micro_batches([s.extent for s in sequences], 60)) > 5
    check(text_policy(MODELS["llama"]), sequences, token_budget=60)


@pytest.mark.parametrize("sizes", [[4, 1, 3], [33]])
def test_the_tri_modal_policy_scores_as_if_each_sequence_ran_alone(
    tokenizer: PreTrainedTokenizerFast, sizes: list[int]
) -> None:
    check(study_policy(tokenizer), study_groups(sizes))


def test_adapters_learn_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = study_policy(tokenizer)
    add_lora(policy, LoraSettings(rank=3))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    check(policy, study_groups([4, 1, 3]))


@pytest.mark.parametrize("length", [0, 1])
def test_completions_without_a_second_token(length: int) -> None:
    sequences = [
        ScoredSequence(prompt_ids=np.array([5, 6, 7][: 1 + i % 3]), completion_ids=np.full(length, 8)) for i in range(4)
    ]
    policy = text_policy(MODELS["llama"])
    batch = build_batch(sequences, None)
    assert batch.tree.branch_ids.shape == (4, 1)
    if length:
        check(policy, sequences)
    ScoringModule(policy)(batch, 1.0)[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in policy.parameters())


def test_bfloat16_is_as_near_to_float32_as_separate_sequences() -> None:
    sequences = text_groups([33, 1, 12, 5])
    _, exact = logprobs_and_gradients(
        policy := text_policy(MODELS["llama"]), lambda: [alone(policy, s) for s in sequences]
    )
    policy = policy.to(torch.bfloat16)
    _, separate = logprobs_and_gradients(policy, lambda: [alone(policy, s) for s in sequences])
    _, shared = logprobs_and_gradients(
        policy, lambda: score_sequences(policy, sequences, None, 1.0, 100_000, grad=True)
    )

    def error(grads: dict[str, Tensor]) -> float:
        return float(torch.cat([(grads[name] - exact[name]).flatten() for name in exact]).norm())

    assert error(shared) < 1.25 * error(separate)


def kept_bytes(run: Callable[[], Any]) -> int:
    """Of all tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("prompt_tokens", "completion_tokens"), [(24, 24), (120, 8), (4, 60)])
def test_memory_follows_the_token_budget_whatever_the_size_of_a_group(
    prompt_tokens: int, completion_tokens: int
) -> None:
    policy, rng = text_policy(LlamaConfig(**{**SIZES, "hidden_size": 64, "head_dim": 16})), np.random.default_rng(0)
    module, largest = ScoringModule(policy), {}
    for size in (1, 8, 256):
        prompts = [rng.integers(0, VOCABULARY, prompt_tokens) for _ in range(256 // size)]
        sequences = [
            ScoredSequence(prompt_ids=prompt, completion_ids=rng.integers(0, VOCABULARY, completion_tokens))
            for prompt in prompts
            for _ in range(size)
        ]
        first = micro_batches([s.extent for s in sequences], 1024)[0]
        largest[size] = kept_bytes(lambda: module(build_batch([sequences[i] for i in first], None), 1.0))  # noqa: B023
    assert largest[256] < 1.2 * largest[8] < 1.5 * largest[1]


def test_a_model_with_another_memory_is_refused_only_where_prompts_are_shared() -> None:
    config = MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    policy = TextPolicy(AutoModelForCausalLM.from_config(config)).eval()
    assert policy.hidden_states(TokenTree.of([np.array([1, 2])])).shape == (2, 8)
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        policy.hidden_states(TokenTree.of([np.array([1, 2])], [np.array([3])], [0]))
