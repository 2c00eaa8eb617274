"""A policy of a few parameters, an item source, and a single-process engine: enough to test the learner without the
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from medtvt_rl.learner.deepspeed_engine import parameter_groups
from medtvt_rl.learner.engine import StepOutcome
from medtvt_rl.learner.fragments import Fragment, held_fragments
from medtvt_rl.learner.scoring import ScoringModule, TokenBatch
from medtvt_rl.learner.training_state import StateReader, TrainingState
from medtvt_rl.model.token_tree import TokenTree
from medtvt_rl.types import Completion, Prompt, TrainingSequence

VOCABULARY, WIDTH, ITEM_WIDTH = 37, 8, 4
STEEP = VOCABULARY


class TinyPolicy(nn.Module):
    """Causal: the running mean of token and item embeddings, then an MLP. Its output embedding is tied."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY + 1, WIDTH)
        self.item = nn.Linear(ITEM_WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        with torch.no_grad():
            self.embedding.weight.mul_(0.3)

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight

    def hidden_states(
        self, tree: TokenTree, items: dict[str, Tensor] | None = None, item_index: Tensor | None = None
    ) -> Tensor:
        stems, branches = self.embedding(tree.stem_ids), self.embedding(tree.branch_ids)
        if items is not None:
            item = self.item(items["x"])[item_index][:, None]
            stems, branches = stems + item, branches + item[tree.stem_of]
        sums = (stems * tree.stem_mask[..., None]).cumsum(dim=1)
        counts = tree.stem_mask.cumsum(dim=1)
        branch_sums = sums[tree.stem_of, -1:] + branches.cumsum(dim=1)
        branch_counts = counts[tree.stem_of, -1:] + torch.ones_like(tree.branch_mask).cumsum(dim=1)
        total = torch.cat([sums.flatten(0, 1), branch_sums.flatten(0, 1)])
        count = torch.cat([counts.flatten(), branch_counts.flatten()]).clamp(min=1)
        mean = (total / count[:, None]).to(stems.dtype)
        return mean + self.mlp(mean) + 0.1 * self.frozen(mean)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(folder) / "policy.pt")


class SteepPolicy(TinyPolicy):
    """The same function, but its gradient is infinite wherever a sequence holds the token STEEP."""

    def hidden_states(
        self, tree: TokenTree, items: dict[str, Tensor] | None = None, item_index: Tensor | None = None
    ) -> Tensor:
        hidden = super().hidden_states(tree, items, item_index)
        stems = (tree.stem_ids == STEEP).any(dim=1)
        branches = stems[tree.stem_of] | (tree.branch_ids == STEEP).any(dim=1)
        steep = torch.cat(
            [
                stems[:, None].expand_as(tree.stem_ids).flatten(),
                branches[:, None].expand_as(tree.branch_ids).flatten(),
            ]
        )
        if not bool(steep.any()):
            return hidden
        rows = hidden[steep]
        return hidden.index_put((steep,), rows + (rows - rows.detach()).sqrt())


class TinyItems:
    """Items that are a function of their id, and a record of what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, item_id: str) -> dict[str, np.ndarray[Any, Any]]:
        self.asked.append(item_id)
        generator = np.random.default_rng(sum(map(ord, item_id)))
        return {"x": generator.standard_normal(ITEM_WIDTH).astype(np.float32)}


class PlainEngine:
    """Single-process torch with the same optimizer: what any other engine must agree with."""

    def __init__(self, policy: nn.Module, clipping: float = 1.0, weight_decay: float = 0.0) -> None:
        self.rank, self.world_size = 0, 1
        self.device, self.dtype, self.policy = torch.device("cpu"), torch.float32, policy
        self.shards_parameters = False
        self._module, self._clipping = ScoringModule(policy), clipping
        groups = parameter_groups(policy, weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-8)
        self.num_backward = 0

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        return self._module(batch, temperature)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.num_backward += 1
        loss.backward()

    def step(self, learning_rate: float) -> StepOutcome:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self._clipping or float("inf"))
        finite = bool(torch.isfinite(norm))
        if finite:
            self._optimizer.step()
        self._optimizer.zero_grad()
        reason = None if finite else "the gradient norm is not finite"
        return StepOutcome(grad_norm=float(norm), learning_rate=learning_rate, skipped=reason)

    def all_reduce(self, values: Tensor, op: Literal["sum", "max"]) -> Tensor:
        return values

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        yield

    def state(self, copy: bool) -> TrainingState:
        return TrainingState.of(self._fragments(), self._shapes(), 1, copy)

    def load(self, folder: Path) -> None:
        with StateReader(folder) as reader:
            reader.check_parameters(self._shapes())
            for fragment in self._fragments():
                fragment.restore(reader.read, reader.moments, reader.steps)
            reader.restore_random(self.rank)

    def _fragments(self) -> list[Fragment]:
        return held_fragments(self._optimizer, self.policy, 0, 0)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.policy.named_parameters() if p.requires_grad}


def make_sequences(count: int, seed: int = 0, version: int = 3, with_reference: bool = True) -> list[TrainingSequence]:
    """Completions of random lengths, two a prompt, with items; the behaviour log-probs are random, near plausible
    ones.
    """
    rng = np.random.default_rng(seed)
    sequences = []
    for index in range(count):
        group, length = index // 2, int(rng.integers(1, 12))
        prompt = Prompt(
            prompt_id=f"p{group}",
            token_ids=np.random.default_rng(group).integers(1, VOCABULARY, 3 + group % 4).astype(np.int32),
            item_id=f"item{group}",
            ground_truth="",
        )
        completion = Completion(
            completion_id=f"{group}/{index % 2}",
            token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
            behaviour_logprobs=(-3.6 + 0.3 * rng.standard_normal(length)).astype(np.float32),
            policy_versions=np.full(length, version - index % 3, dtype=np.int32),
            finish_reason="stop",
        )
        reference = (-3.6 + 0.3 * rng.standard_normal(length)).astype(np.float32) if with_reference else None
        sequences.append(
            TrainingSequence(
                group_id=group,
                prompt=prompt,
                completion=completion,
                advantage=float(rng.standard_normal()),
                reference_logprobs=reference,
            )
        )
    return sequences
