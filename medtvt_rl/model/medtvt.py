"""The tri-modal model as a Hugging Face model: a study tower in front of a Llama language model.

Owns: MedTVTConfig, MedTVTForCausalLM, where the study's tokens go in the prompt, and their registration with
`transformers`. Does not own: initialisation and sizes (build.py), adapters and weight export (policy.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from medtvt_rl.model.config import CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig, PerceptionConfig
from medtvt_rl.model.kept_adapter import read_adapter
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.token_tree import TokenTree, tree_states
from medtvt_rl.model.tower import StudyTower
from medtvt_rl.types import MODALITIES

ITEM_KEYS = (*MODALITIES, "present")


class MedTVTConfig(LlamaConfig):
    """A LlamaConfig with the tower's settings.

    Attributes:
        ecg, cxr, lab, perception: fields of the dataclasses in model/config.py.
        placeholder_token_ids: ids of <ecg>, <cxr>, <lab>.
        ignored_label: a label that counts as -100 does, for labels padded with it; None where there is none.
        untrained_stand_ins: what stands in for a missing modality is random, because no training has seen one missing.
        film_crop: data.film.crop of the training.
        max_answer_tokens: rollout.sampling.max_new_tokens of the training; where `diagnose` cuts an answer.
    """

    model_type = "medtvt"

    ecg: dict[str, Any] | None = None
    cxr: dict[str, Any] | None = None
    lab: dict[str, Any] | None = None
    perception: dict[str, Any] | None = None
    placeholder_token_ids: list[int] | None = None
    ignored_label: int | None = None
    untrained_stand_ins: bool = False
    film_crop: str = "whole"
    max_answer_tokens: int = 256

    @property
    def tokens_per_modality(self) -> int:
        """K: soft tokens that stand for each modality."""
        return PerceptionConfig(**(self.perception or {})).tokens_per_modality

    @property
    def study_placeholders(self) -> list[int]:
        """The 3K placeholder ids of a study in the order of its tokens."""
        if self.placeholder_token_ids is None or len(self.placeholder_token_ids) != len(MODALITIES):
            raise ValueError(
                f"placeholder_token_ids: {self.placeholder_token_ids}, expected the ids of <ecg>, <cxr>, <lab>; "
                "build the model with model/build.py or set them in config.json"
            )
        return [token for token in self.placeholder_token_ids for _ in range(self.tokens_per_modality)]

    def build_tower(self) -> StudyTower:
        """A tower of these sizes with fresh weights."""
        return StudyTower(
            EcgEncoderConfig(**(self.ecg or {})),
            CxrEncoderConfig(**(self.cxr or {})),
            LabEncoderConfig(**(self.lab or {})),
            PerceptionConfig(**(self.perception or {})),
            self.hidden_size,
        )


def place_study_tokens(input_ids: Tensor, embeddings: Tensor, tokens: Tensor, placeholders: list[int]) -> Tensor:
    """Puts each row's study tokens where its prompt holds placeholders, in whatever order it names the modalities.

    Only the first 3K placeholders of a row are the study; one that the model itself sampled later stays text, as it
    does in the rollout engine. So a prompt may not name a modality twice, as it may in the published implementation.

    Args:
        input_ids: [B, T].
        embeddings: [B, T, D] of input_ids.
        tokens: [B, 3K, D].
        placeholders: 3K ids, those of `tokens`.

    Returns:
        [B, T, D].

    Raises:
        ValueError: a row does not start its placeholders with exactly these, in some order.
    """
    is_placeholder = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device))
    is_study = is_placeholder & (is_placeholder.cumsum(dim=1) <= len(placeholders))
    found = is_study.sum(dim=1)
    whole = not bool((found != len(placeholders)).any())
    order = study_order(input_ids[is_study].view(len(input_ids), -1), placeholders) if whole else None
    if order is None:
        raise ValueError(
            f"input_ids: rows hold {found.tolist()} placeholders, expected the {len(placeholders)} ids {placeholders} "
            "in some order in every row; expand <ecg>, <cxr>, <lab> exactly once, when the prompt is built"
        )
    ordered = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
    return embeddings.masked_scatter(is_study.unsqueeze(-1), ordered.to(embeddings.dtype))


def study_order(found: Tensor, placeholders: list[int]) -> Tensor | None:
    """Which of a study's tokens stands at each placeholder of a prompt; those of one modality keep their own order.

    Args:
        found: [B, 3K] ids, as the prompts hold them.
        placeholders: 3K ids, those of the study's tokens.

    Returns:
        [B, 3K] int64; None where a row holds others, or one too often.
    """
    expected = torch.tensor(placeholders, device=found.device)
    # The place at which a modality's tokens begin, for each placeholder that was found.
    begins = (found.unsqueeze(-1) == expected).int().argmax(dim=-1)
    places = begins.argsort(dim=1, stable=True)
    if bool((found.gather(1, places) != expected).any()):
        return None
    return places.argsort(dim=1)


class MedTVTForCausalLM(PreTrainedModel, GenerationMixin):
    """Llama that reads one study (ECG, film, laboratory values) through placeholder tokens in its prompt."""

    config_class = MedTVTConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MedTVTConfig) -> None:
        super().__init__(config)
        self.study_tower = config.build_tower()
        self.language_model = LlamaForCausalLM(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Tower modules keep the initialisation of their constructors; the language model initialises itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the output layer."""
        self.language_model.lm_head = value

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any model. Low-rank pairs that the folder keeps beside its weights (kept_adapter.py) are merged; with
        `merge_adapter=False` they are left out, as `peft.PeftModel` wants its base."""
        merge = kwargs.pop("merge_adapter", True)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kept = read_adapter(pretrained_model_name_or_path) if merge and pretrained_model_name_or_path else None
        if kept is not None:
            kept.merge_into(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: logits are hidden states times its transpose."""
        return self.language_model.lm_head.weight

    def perceive(self, ecg: Tensor, cxr: Tensor, lab: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Soft tokens [U, 3K, D] and gates [U, 3] of U studies, in the order ECG, film, labs; see StudyTower."""
        return self.study_tower(ecg, cxr, lab, present)

    def embed(
        self,
        input_ids: Tensor,
        items: dict[str, Tensor] | None,
        item_index: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Input embeddings [B, T, D]; the tower runs once per row of `items`, whatever the number of rows B.

        No padding (`mask` [B, T] is 0) is taken for a placeholder.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if items is None:
            return embeddings
        tokens, _ = self.perceive(items["ecg"], items["cxr"], items["lab"], items.get("present"))
        if item_index is None and len(tokens) != len(input_ids):
            raise ValueError(
                f"items: {len(tokens)} studies for {len(input_ids)} rows; give item_index [B], the study of each row"
            )
        rows = tokens if item_index is None else tokens[item_index]
        known = input_ids if mask is None else input_ids.masked_fill(mask == 0, -1)
        return place_study_tokens(known, embeddings, rows, self.config.study_placeholders)

    def hidden_states(
        self, tree: TokenTree, items: dict[str, Tensor] | None = None, item_index: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [U * P + B * C, D], after the final norm; see tree_states.

        Args:
            tree: stems hold the placeholders of their study; a branch is text, whatever it holds.
            items: tensors of the studies, see StudyTower.forward; None for plain text.
            item_index: [U]: stem u reads study item_index[u]; None means stem u reads study u.
        """
        stems = self.embed(tree.stem_ids, items, item_index, tree.stem_mask)
        return tree_states(self.language_model.model, tree, stems)

    def forward(
        self,
        input_ids: Tensor | None = None,
        ecg: Tensor | None = None,
        cxr: Tensor | None = None,
        lab: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        present: Tensor | None = None,
        item_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the loss where labels [B, T] are given, as of any causal language model.

        The study (ecg, cxr, lab, present; see StudyTower.forward) is read with the prompt; steps that continue a cache
        need none. With `inputs_embeds` the study is the caller's matter. Labels of -100 and of `config.ignored_label`
        do not count. What `attention_mask` [B, T] hides is no placeholder, whatever its id.
        """
        has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids: None, expected [B, T] ids, or inputs_embeds in their place")
            items = None
            if ecg is not None and cxr is not None and lab is not None and not has_past:
                items = {"ecg": ecg, "cxr": cxr, "lab": lab}
                items |= {} if present is None else {"present": present}
            mask = attention_mask if attention_mask is not None and attention_mask.shape == input_ids.shape else None
            inputs_embeds = self.embed(input_ids, items, item_index, mask)
        if labels is not None and self.config.ignored_label is not None:
            labels = labels.masked_fill(labels == self.config.ignored_label, -100)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _expand_inputs_for_generation(self, *args: Any, **model_kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Repeats rows for several answers per prompt, but not the studies, which are read once and shared."""
        items = {key: model_kwargs.pop(key) for key in ITEM_KEYS if model_kwargs.get(key) is not None}
        if items and model_kwargs.get("item_index") is None:
            model_kwargs["item_index"] = torch.arange(len(items["ecg"]), device=items["ecg"].device)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **model_kwargs)  # type: ignore[misc]
        return input_ids, model_kwargs | items

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder, adapters merged, that from_pretrained and the rollout engine read."""
        self.save_pretrained(folder, state_dict=dict(named_weights(self)))


def load_exactly(kind: Any, folder: str | Path, dtype: torch.dtype | str) -> Any:
    """`kind.from_pretrained(folder)`, but weights that are missing, left over or of another size are an error.

    An adapter beside the weights is left to the caller.

    Raises:
        ValueError: weights and configuration of the folder do not fit each other exactly.
    """
    own = {"merge_adapter": False} if issubclass(kind, MedTVTForCausalLM) else {}
    model, report = kind.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=False,
        **own,
    )
    faults = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if faults:
        raise ValueError(f"model folder: {folder} does not fit its config.json: {faults}; save the model again, whole")
    return model


AutoConfig.register(MedTVTConfig.model_type, MedTVTConfig, exist_ok=True)
AutoModelForCausalLM.register(MedTVTConfig, MedTVTForCausalLM, exist_ok=True)
