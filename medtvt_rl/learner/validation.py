"""What a supervised stage is judged by: the loss on held-out answers, and the rewards of sampled ones.

Owns: sampling by the policy itself, sharded over ranks, and the means over all of them. Does not own: the rewards
(rewards/scorer.py), or the final evaluation (evaluation/), which samples with the rollout engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from medtvt_rl.algorithm.packing import micro_batches
from medtvt_rl.learner.engine import TrainingEngine
from medtvt_rl.learner.scoring import ItemSource, ScoredSequence, build_batch, load_items, whole_rows
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rewards.scorer import Scorer
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.types import Prompt

ROWS_PER_CALL = 256


class HeldOutLoss:
    """Mean loss per answer token over held-out examples, all ranks together."""

    def __init__(
        self, engine: TrainingEngine, items: ItemSource | None, examples: Sequence[ScoredSequence], token_budget: int
    ) -> None:
        self._engine, self._items = engine, items
        self._num_tokens = sum(len(example.completion_ids) for example in examples)
        ranks = [examples[rank :: engine.world_size] for rank in range(engine.world_size)]
        plans = [micro_batches(whole_rows(own), token_budget) for own in ranks]
        own, plan = ranks[engine.rank], plans[engine.rank]
        padding = [(list(examples[:1]), False)] * (max(map(len, plans)) - len(plan))
        self._batches = [([own[i] for i in members], True) for members in plan] + padding

    @torch.no_grad()
    def __call__(self) -> float:
        """All ranks run equally many batches, because sharded parameters are gathered in each."""
        self._engine.policy.eval()
        total = torch.zeros(1, dtype=torch.float64)
        for examples, counted in self._batches:
            batch = build_batch(examples, self._items, self._engine.dtype, self._engine.device, share_prompts=False)
            logprobs, _ = self._engine.forward(batch, 1.0)
            total -= logprobs.double().sum().cpu() * float(counted)
        return float(self._engine.all_reduce(total, "sum").item()) / max(self._num_tokens, 1)


class SampledRewards:
    """Mean rewards of answers that the policy samples, as it will be sampled in GRPO."""

    def __init__(
        self,
        engine: TrainingEngine,
        items: ItemSource | None,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        rewards: Mapping[str, RewardConfig],
        sampling: SamplingConfig,
        num_samples: int,
        seed: int,
    ) -> None:
        if not prompts:
            raise ValueError(
                "prompts: the validation split has none; check task.prompts, and for studies data.qa and the "
                "problems.csv of the store"
            )
        self._engine, self._items, self._tokenizer = engine, items, tokenizer
        self._own = list(prompts[engine.rank :: engine.world_size])
        self._scorer, self._components = Scorer(rewards), tuple(rewards)
        self._sampling, self._num_samples, self._seed = sampling, num_samples, seed

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """`total` and each component's mean over all samples, `failed` (share), and `length` (mean tokens)."""
        sums: dict[str, float] = defaultdict(float)
        self._engine.policy.eval()
        devices = [self._engine.device] if self._engine.device.type == "cuda" else []
        with self._engine.gathered(self._engine.policy.parameters()), torch.random.fork_rng(devices):
            torch.manual_seed(self._seed + self._engine.rank)
            for prompts in self._batches():
                for prompt, answers in zip(prompts, self._sample(prompts)):
                    self._count(prompt, answers, sums)
        return self._means(sums)

    def _batches(self) -> list[list[Prompt]]:
        """Prompts of equal length, so that none is padded."""
        by_length: dict[int, list[Prompt]] = defaultdict(list)
        for prompt in self._own:
            by_length[len(prompt.token_ids)].append(prompt)
        size = max(1, ROWS_PER_CALL // self._num_samples)
        return [group[i : i + size] for group in by_length.values() for i in range(0, len(group), size)]

    def _sample(self, prompts: Sequence[Prompt]) -> list[list[list[int]]]:
        """Token ids of `num_samples` answers for each prompt, cut after the end token."""
        policy: Any = self._engine.policy
        generator = policy if hasattr(policy, "generate") else policy.model
        input_ids = torch.from_numpy(np.stack([p.token_ids for p in prompts]).astype(np.int64)).to(self._engine.device)
        stacked, index = load_items([p.item_id for p in prompts], self._items, self._engine.dtype)
        extra = {} if stacked is None else {name: value.to(self._engine.device) for name, value in stacked.items()}
        if index is not None:
            extra["item_index"] = index.to(self._engine.device)
        sampled = generator.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=True,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=max(self._sampling.top_k, 0),
            max_new_tokens=self._sampling.max_new_tokens,
            num_return_sequences=self._num_samples,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            **extra,
        )
        rows = [self._cut(row) for row in sampled[:, input_ids.shape[1] :].tolist()]
        return [rows[i : i + self._num_samples] for i in range(0, len(rows), self._num_samples)]

    def _cut(self, tokens: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens

    def _count(self, prompt: Prompt, answers: Sequence[list[int]], sums: dict[str, float]) -> None:
        texts = [self._tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        rewards = self._scorer.score(texts, prompt.ground_truth, prompt.evidence)
        sums["samples"] += len(answers)
        sums["total"] += float(rewards.total.sum())
        sums["failed"] += float(rewards.failed.sum())
        sums["length"] += float(sum(map(len, answers)))
        for name, values in rewards.components.items():
            sums[f"reward/{name}"] += float(values.sum())

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        names = ["samples", "total", "failed", "length", *(f"reward/{name}" for name in self._components)]
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        totals = self._engine.all_reduce(values, "sum").tolist()
        return {name: value / max(totals[0], 1.0) for name, value in zip(names[1:], totals[1:])}
