"""Log-probs of given tokens under a policy: the one place where the learner and the reference policy compute them.

Owns: the chunked log-prob function, the batch it is computed over, and `score_sequences`.
Does not own: what becomes of the log-probs (algorithm/losses.py), which sequences share a batch
(algorithm/packing.py), or how completions share a prompt (model/token_tree.py). The temperature divides the logits
here as it does in the rollout engine, so that both describe one distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medtvt_rl.algorithm.packing import Extent, micro_batches
from medtvt_rl.model.token_tree import TokenTree

CHUNK_ROWS = 128


class ItemSource(Protocol):
    """Where the multimodal item of a prompt comes from."""

    def get(self, item_id: str) -> Mapping[str, NDArray[Any]]:
        """Arrays of one item, unbatched; every item of a source has the same names and shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSequence:
    """A prompt and the completion whose tokens are scored.

    Attributes:
        prompt_ids: [P] int, P > 0.
        completion_ids: [T] int.
        item_id: key into the item source; None for plain text.
    """

    prompt_ids: NDArray[np.integer[Any]]
    completion_ids: NDArray[np.integer[Any]]
    item_id: str | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def extent(self) -> Extent:
        """What packing needs to know; sequences of one prompt, with its item, share it."""
        return Extent(
            prompt=(self.item_id, self.prompt_ids.astype(np.int64).tobytes()),
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.completion_ids),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """A micro-batch of B completions with N tokens to score.

    Attributes:
        tree: prompts and completions; the last token of a completion predicts nothing, and is left out.
        items: tensors of the unique items, each once; None for plain text.
        item_index: [U] int64, the item of each stem; None for plain text.
        states: [N] int64, which of the tree's hidden states predicts each scored token.
        rows, slots: [N] int64, completion and place in it of each scored token.
        targets: [N] int64, the scored tokens.
        lengths: tokens of each completion.
    """

    tree: TokenTree
    items: dict[str, Tensor] | None
    item_index: Tensor | None
    states: Tensor
    rows: Tensor
    slots: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    def spread(self, values: Tensor) -> Tensor:
        """[N] values of the scored tokens as [B, T], T the longest completion, zeros elsewhere."""
        matrix = values.new_zeros(len(self.lengths), max(max(self.lengths, default=0), 1))
        return matrix.index_put((self.rows, self.slots), values)

    def mask(self) -> Tensor:
        """[B, T] bool: where `spread` holds a token."""
        return self.spread(torch.ones_like(self.targets, dtype=torch.bool))


class _ChunkedLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T / temperature)[targets] without ever holding [N, V] logits.

    Forward keeps the log-normaliser [N]; backward recomputes the logits of each chunk. Peak memory is one chunk of
    logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        count = len(hidden)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normaliser, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, count, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (hidden[rows] @ weight.T).float().div_(temperature)
            normaliser[rows] = torch.logsumexp(logits, dim=-1)
            logits.sub_(normaliser[rows, None])
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0]
            # A logit of -inf has probability 0 and adds 0 to the entropy, not NaN.
            entropy[rows] = -(logits.exp() * logits.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        upstream = grads[0] / ctx.temperature
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (hidden[rows] @ weight.T).float().div_(ctx.temperature)
            # d logprob / d logit = onehot(target) - softmax
            grad_logits = logits.sub_(normaliser[rows, None]).exp_().neg_()
            grad_logits.scatter_add_(1, targets[rows, None], grad_logits.new_ones(len(grad_logits), 1))
            grad_logits = grad_logits.mul_(upstream[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.add_((grad_logits.T @ hidden[rows]).float())
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens, and the entropy of the distributions they came from.

    Args:
        hidden: [N, D] hidden states, each predicting its target.
        weight: [V, D] output embedding.
        targets: [N] int64.
        temperature: divides the logits; positive.

    Returns:
        log-probs [N] float32, differentiable in hidden and weight; entropies [N] float32, nats, without gradient.

    Raises:
        ValueError: temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, expected > 0; greedy text has no distribution to score")
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature)


class ScoringModule(nn.Module):
    """The policy as a training engine runs it: one forward from a TokenBatch to log-probs.

    The whole computation lies inside one module call, so that an engine which shards parameters sees all uses of them.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs [N] and entropies [N] of the batch's scored tokens."""
        policy: Any = self.policy
        hidden = policy.hidden_states(batch.tree, batch.items, batch.item_index)
        return token_logprobs(hidden[batch.states], policy.output_weight, batch.targets, temperature)


def load_items(
    item_ids: Sequence[str | None], items: ItemSource | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """The unique items among those of some prompts, stacked, and the row that each prompt uses.

    Floating tensors are cast to `dtype`, the policy's.

    Raises:
        ValueError: some prompts have an item and others have none, or there is no source for them.
    """
    named = [item_id for item_id in item_ids if item_id is not None]
    if not named:
        return None, None
    if items is None or len(named) != len(item_ids):
        raise ValueError(
            f"items: {len(named)} of {len(item_ids)} sequences name an item and the item source is {items!r}; "
            "give every prompt an item and name the source in task.items"
        )
    unique = list(dict.fromkeys(named))
    loaded = [items.get(item_id) for item_id in unique]
    stacked = {name: torch.from_numpy(np.stack([item[name] for item in loaded])) for name in loaded[0]}
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in stacked.items()}
    rows = {item_id: row for row, item_id in enumerate(unique)}
    return cast, torch.tensor([rows[item_id] for item_id in named])


def build_batch(
    sequences: Sequence[ScoredSequence],
    items: ItemSource | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    share_prompts: bool = True,
) -> TokenBatch:
    """Pads sequences and loads each of their items once.

    Args:
        share_prompts: each prompt is a stem and its completions are branches. Otherwise a whole sequence is a stem, and
            there are no branches: one forward pass in the place of two, for completions that share nothing. Ranks that
            shard parameters must choose alike.
    """
    keys = [sequence.extent.prompt if share_prompts else row for row, sequence in enumerate(sequences)]
    owners = dict(zip(keys, sequences))
    places = {key: place for place, key in enumerate(owners)}
    stem_of = [places[key] for key in keys]
    if share_prompts:
        stems, branches = [s.prompt_ids for s in owners.values()], [s.completion_ids[:-1] for s in sequences]
        tree = TokenTree.of(stems, branches, stem_of, device)
    else:
        stems = [np.concatenate([s.prompt_ids, s.completion_ids[:-1]]) for s in sequences]
        tree = TokenTree.of(stems, device=device)
    lengths = [len(s.completion_ids) for s in sequences]
    rows = np.repeat(np.arange(len(sequences)), lengths)
    slots = np.concatenate([np.arange(length) for length in lengths])
    start = np.array([len(s.prompt_ids) - len(stems[stem]) for s, stem in zip(sequences, stem_of)])
    states = tree.state_index(np.array(stem_of)[rows], rows, start[rows] + slots - 1)
    stacked, item_index = load_items([s.item_id for s in owners.values()], items, dtype)

    def flat(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    return TokenBatch(
        tree=tree,
        items=None if stacked is None else {name: value.to(device) for name, value in stacked.items()},
        item_index=None if item_index is None else item_index.to(device),
        states=flat(states),
        rows=flat(rows),
        slots=flat(slots),
        targets=flat(np.concatenate([s.completion_ids for s in sequences])),
        lengths=tuple(lengths),
    )


def whole_rows(sequences: Sequence[ScoredSequence]) -> list[Extent]:
    """What packing needs to know where no prompt is shared: each sequence is a prompt of its own, whole."""
    return [
        Extent(prompt=row, prompt_tokens=sequence.length, completion_tokens=0) for row, sequence in enumerate(sequences)
    ]


def score_sequences(
    policy: nn.Module,
    sequences: Sequence[ScoredSequence],
    items: ItemSource | None,
    temperature: float,
    token_budget: int,
    grad: bool = False,
) -> list[Tensor]:
    """Log-probs of each completion's tokens, in the order given: [T_i] float32 each.

    Args:
        policy: a PolicyModel; its mode (eval or train) is the caller's.
        token_budget: of one micro-batch, see micro_batches.
        grad: keep the graph; off, memory is that of one micro-batch.
    """
    first = next(policy.parameters())
    module, scores = ScoringModule(policy), [torch.empty(0)] * len(sequences)
    with torch.set_grad_enabled(grad):
        for members in micro_batches([sequence.extent for sequence in sequences], token_budget):
            batch = build_batch([sequences[i] for i in members], items, first.dtype, first.device)
            logprobs, _ = module(batch, temperature)
            for index, part in zip(members, logprobs.split(batch.lengths)):
                scores[index] = part
    return scores
