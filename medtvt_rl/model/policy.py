"""The policy as learner, reference and supervised stages use it: hidden states in, named weights out.

Owns: the PolicyModel interface, loading a policy from a folder, the wrapper around plain text models, low-rank adapters
and their functional merge, and the names under which weights travel. Does not own: losses, optimizers, transport.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.kept_adapter import read_adapter
from medtvt_rl.model.medtvt import MedTVTConfig, MedTVTForCausalLM, load_exactly
from medtvt_rl.model.named_weights import ADAPTER, named_weights
from medtvt_rl.model.seal import check_model_folder
from medtvt_rl.model.token_tree import TokenTree, tree_states
from medtvt_rl.model.tower import set_encoders_trainable

ADAPTED_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@runtime_checkable
class PolicyModel(Protocol):
    """What a policy must offer; also an nn.Module."""

    def hidden_states(
        self, tree: TokenTree, items: dict[str, Tensor] | None = None, item_index: Tensor | None = None
    ) -> Tensor:
        """[U * P + B * C, D], see tree_states; stem u reads item item_index[u]."""
        ...

    @property
    def output_weight(self) -> Tensor:
        """[V, D]."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder."""
        ...


class TextPolicy(nn.Module):
    """Any Hugging Face causal language model as a policy without multimodal items.

    Attributes:
        weight_prefix: what stands before the weights' own names, and does not travel.
    """

    weight_prefix = "model."

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def hidden_states(
        self, tree: TokenTree, items: dict[str, Tensor] | None = None, item_index: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [U * P + B * C, D], see tree_states. Raises ValueError if items are given."""
        if items is not None:
            raise ValueError(f"items: a {type(self.model).__name__} reads no multimodal items; set task.items to null")
        return tree_states(self.model.base_model, tree)

    @property
    def output_weight(self) -> Tensor:
        """[V, D]."""
        return self.model.get_output_embeddings().weight

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.model.config

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder, adapters merged."""
        self.model.save_pretrained(folder, state_dict=dict(named_weights(self)))


def load_policy(
    folder: str | Path, dtype: torch.dtype | str = torch.float32, lora: LoraSettings | None = None
) -> MedTVTForCausalLM | TextPolicy:
    """The policy in a Hugging Face folder, encoders frozen, in evaluation mode.

    Args:
        folder: a MedTVT folder, or that of any causal language model of `transformers`; one whose class is a
            PolicyModel itself is taken as it is.
        lora: adds adapters where its rank is not 0: the one that the folder keeps, else fresh ones. With rank 0 what
            the folder keeps is merged.

    Raises:
        ValueError: the folder is not one, or its weights and its configuration do not fit each other exactly, or it
            keeps an adapter of another rank.
    """
    check_model_folder(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind: Any = MedTVTForCausalLM if isinstance(config, MedTVTConfig) else AutoModelForCausalLM
    model = load_exactly(kind, folder, dtype)
    policy: Any = model if isinstance(model, PolicyModel) else TextPolicy(model)
    set_encoders_trainable(policy, False)
    kept = read_adapter(folder)
    if lora is not None and lora.rank > 0:
        add_lora(policy, lora)
        if kept is not None:
            kept.load_into(policy, lora.rank, lora.alpha / lora.rank, ADAPTER)
    elif kept is not None:
        kept.merge_into(policy)
    return policy.eval()


def add_lora(policy: MedTVTForCausalLM | TextPolicy, settings: LoraSettings) -> None:
    """Adds low-rank adapters to the backbone's linear layers and freezes the layers beneath (arXiv 2106.09685).

    A study tower keeps its own gradients; embeddings and output layer learn where `train_embeddings` says so.
    A folder holds merged weights only, so that every stage starts adapters of its own.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if settings.rank < 1:
        raise ValueError(f"model.lora.rank: {settings.rank}, expected at least 1 to add adapters")
    backbone = policy.language_model if isinstance(policy, MedTVTForCausalLM) else policy.model
    backbone.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=list(ADAPTED_LAYERS),
        ),
        backbone,
        adapter_name=ADAPTER,
    )
    for embedding in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
        embedding.requires_grad_(settings.train_embeddings)
