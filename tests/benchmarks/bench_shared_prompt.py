"""Seconds of a learner's forward and backward passes, each prompt run once against once for each of its completions.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_shared_prompt.py [--repeats 5]

Both variants run in turns on one thread and pack for the same token budget; the ratio of their best times is what
counts. In the last case there is nothing to share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from medtvt_rl.algorithm.packing import micro_batches
from medtvt_rl.learner.scoring import ScoredSequence, ScoringModule, build_batch, token_logprobs
from medtvt_rl.model.policy import TextPolicy

VOCABULARY, TOKEN_BUDGET = 689, 8192


@dataclass(frozen=True)
class Case:
    """Groups of completions, whose lengths are drawn from `shortest` to `longest`."""

    name: str
    num_groups: int
    group_size: int
    prompt_tokens: int
    shortest: int
    longest: int

    def sequences(self) -> list[ScoredSequence]:
        """Random tokens."""
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, VOCABULARY, self.prompt_tokens) for _ in range(self.num_groups)]
        return [
            ScoredSequence(
                prompt_ids=prompt,
                completion_ids=rng.integers(0, VOCABULARY, int(rng.integers(self.shortest, self.longest + 1))),
            )
            for prompt in prompts
            for _ in range(self.group_size)
        ]


CASES = (
    Case("quickstart, 16 groups of 8", 16, 8, 23, 40, 60),
    Case("prompt 192, completions 64, 4 groups of 8", 4, 8, 192, 64, 64),
    Case("prompt 192, completions 64, 1 group of 32", 1, 32, 192, 64, 64),
    Case("prompt 192, completions 16-64, 4 groups of 8", 4, 8, 192, 16, 64),
    Case("64 prompts of one completion", 64, 1, 23, 40, 60),
)


def build_policy() -> TextPolicy:
    """The size of the quickstart's language model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return TextPolicy(LlamaForCausalLM(config)).eval()


def shared(policy: TextPolicy, sequences: list[ScoredSequence]) -> float:
    """The learner's way."""
    module, total = ScoringModule(policy), 0.0
    for members in micro_batches([sequence.extent for sequence in sequences], TOKEN_BUDGET):
        logprobs, _ = module(build_batch([sequences[i] for i in members], None), 1.0)
        total += backward(logprobs)
    return total


def separate(policy: TextPolicy, sequences: list[ScoredSequence]) -> float:
    """Rows of prompt and completion, padded on the right, longest first."""
    total, rows = 0.0, sorted(sequences, key=lambda sequence: -sequence.length)
    while rows:
        count = TOKEN_BUDGET // rows[0].length
        total += backward(separate_logprobs(policy, rows[:count]))
        rows = rows[count:]
    return total


def separate_logprobs(policy: TextPolicy, rows: list[ScoredSequence]) -> Tensor:
    """Log-probs of all completion tokens, row after row."""
    tokens = [torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids])) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    decoder: Any = policy.model.base_model
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    places = [slice(len(row.prompt_ids) - 1, row.length - 1) for row in rows]
    states = torch.cat([hidden[i, place] for i, place in enumerate(places)])
    targets = torch.cat([torch.from_numpy(row.completion_ids) for row in rows])
    return token_logprobs(states, policy.output_weight, targets, 1.0)[0]


def backward(logprobs: Tensor) -> float:
    """The sum of the log-probs, its gradient added to the parameters."""
    logprobs.sum().backward()
    return float(logprobs.detach().sum())


def seconds(run: Callable[[TextPolicy, list[ScoredSequence]], float], *arguments: Any) -> float:
    """Of one call."""
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    policy = build_policy()
    print(f"{'case':<46}{'separate s':>11}{'shared s':>10}{'ratio':>7}")
    for case in CASES:
        sequences = case.sequences()
        times = [[seconds(variant, policy, sequences) for variant in (separate, shared)] for _ in range(repeats)]
        one, other = (min(column) for column in zip(*times))
        print(f"{case.name:<46}{one:>11.3f}{other:>10.3f}{one / other:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
