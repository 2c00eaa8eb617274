"""Texts that begin alike: what they share runs once, and what follows attends to its keys and values.

Owns: the padded form of such texts, and their way through a decoder. Does not own: how tokens are embedded (medtvt.py),
or which texts run together (algorithm/packing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

TokenIds = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTree:
    """U stems and B branches, each of which continues a stem; B may be 0.

    Stems are padded on the left and branches on the right, so that a branch lies beside its stem and a window of
    columns is a window of tokens. Padding holds 0 and is told by the masks, whatever token 0 means.

    Attributes:
        stem_ids: [U, P] int64.
        stem_mask: [U, P] int64, 1 = token, 0 = padding.
        branch_ids: [B, C] int64, C is 1 or more even if no branch has a token.
        branch_mask: [B, C] int64.
        stem_of: [B] int64, the stem that each branch continues.
    """

    stem_ids: Tensor
    stem_mask: Tensor
    branch_ids: Tensor
    branch_mask: Tensor
    stem_of: Tensor

    @classmethod
    def of(
        cls,
        stems: Sequence[TokenIds],
        branches: Sequence[TokenIds] = (),
        stem_of: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> TokenTree:
        """Pads stems (one token or more each) and branches (none or more)."""
        stem_ids, stem_mask = _padded(stems, left=True)
        branch_ids, branch_mask = _padded(branches, left=False)
        return cls(
            stem_ids=stem_ids.to(device),
            stem_mask=stem_mask.to(device),
            branch_ids=branch_ids.to(device),
            branch_mask=branch_mask.to(device),
            stem_of=torch.tensor(stem_of, dtype=torch.int64).to(device),
        )

    def state_index(self, stem: NDArray[Any], branch: NDArray[Any], column: NDArray[Any]) -> NDArray[Any]:
        """Where `tree_states` holds the states of tokens; columns count from the end of the stem, below 0 within it."""
        (num_stems, width), branch_width = self.stem_ids.shape, self.branch_ids.shape[1]
        in_branch = num_stems * width + branch * branch_width + column
        return np.where(column < 0, (stem + 1) * width + column, in_branch)


def _padded(rows: Sequence[TokenIds], left: bool) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        columns = slice(ids.shape[1] - len(tokens), None) if left else slice(len(tokens))
        ids[row, columns] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, columns] = 1
    return ids, mask


def tree_states(decoder: Any, tree: TokenTree, stem_embeddings: Tensor | None = None) -> Tensor:
    """Last hidden states [U * P + B * C, D]: of the columns of all stems, then of all branches, padding included.

    The decoder runs once for stems and, unless B is 0, once for branches; gradients flow through both, whatever is
    made of the states. So ranks that shard parameters gather them equally often.

    Args:
        decoder: base model of a Hugging Face causal language model.
        stem_embeddings: [U, P, D] in the place of the stems' ids.

    Raises:
        ValueError: a layer remembers in another form than keys and values, and there are branches.
    """
    stem = {"input_ids": tree.stem_ids} if stem_embeddings is None else {"inputs_embeds": stem_embeddings}
    positions = tree.stem_mask.cumsum(dim=1) - 1
    stem |= {"attention_mask": tree.stem_mask, "position_ids": positions.clamp(min=0)}
    if not len(tree.stem_of):
        return decoder(**stem, use_cache=False).last_hidden_state.flatten(0, 1)
    cache = _empty_cache(decoder)
    stem_states = decoder(**stem, past_key_values=cache, use_cache=True).last_hidden_state
    for layer in cache.layers:
        layer.keys, layer.values = _copies(layer.keys, tree.stem_of), _copies(layer.values, tree.stem_of)
    # Padding comes after all tokens of a branch, which therefore never attend to it; it stays unmasked, so that a batch
    # of empty branches has a query. Its positions stay within the model's.
    branch_states = decoder(
        input_ids=tree.branch_ids,
        attention_mask=torch.cat([tree.stem_mask[tree.stem_of], torch.ones_like(tree.branch_mask)], dim=1),
        position_ids=positions[tree.stem_of, -1:] + tree.branch_mask.cumsum(dim=1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([stem_states.flatten(0, 1), branch_states.flatten(0, 1)])


def _empty_cache(decoder: Any) -> Any:
    cache = DynamicCache(config=decoder.config)
    other = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if other:
        raise ValueError(
            f"model: {type(decoder).__name__} has layers with {sorted(kind.__name__ for kind in other)}, expected "
            "attention over keys and values alone: the completions of a prompt cannot share another memory"
        )
    return cache


def _copies(states: Tensor, rows: Tensor) -> Tensor:
    """A row of `states` for each branch; their gradients are summed in float32, whatever the type of `states`."""
    return states.float()[rows].to(states.dtype)
