"""The tri-modal model inside vLLM: one patient is one multimodal item of modality "study".

Owns: how an item becomes tensors, where its tokens lie in the prompt, and the model class that vLLM runs. The study
tower is the very module of training. Does not own: registration (vllm_plugin.py), scheduling, sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.feature_extraction_utils import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from medtvt_rl.model.medtvt import ITEM_KEYS, MedTVTConfig, study_order
from medtvt_rl.model.vllm_heads import padded_heads
from medtvt_rl.types import MODALITIES

STUDY = "study"
ORDER = "study_order"


class StudyBatch(ProcessorBatchItems):
    """The items of one prompt: each a dict of ecg, cxr, lab, present."""

    def __init__(self, data: Any) -> None:
        super().__init__([data] if isinstance(data, dict) else list(data), STUDY)

    def get_processor_data(self) -> Mapping[str, object]:
        """Hands the items to the processor as they are."""
        return {"studies": self.get_all()}


class StudyDataParser(MultiModalDataParser):
    """Parses {"study": item}."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {STUDY: StudyBatch}


class StudyProcessingInfo(BaseProcessingInfo):
    """Limits: one study in a prompt."""

    def get_data_parser(self) -> MultiModalDataParser:
        """The parser of items."""
        return StudyDataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """At most one study."""
        return {STUDY: 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """3K soft tokens."""
        return {STUDY: len(self.study_config.study_placeholders)}

    @property
    def study_config(self) -> MedTVTConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(MedTVTConfig)


class StudyDummyInputs(BaseDummyInputsBuilder[StudyProcessingInfo]):
    """Blank inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """The placeholders of as many studies."""
        tokens = self.info.get_tokenizer().convert_ids_to_tokens(self.info.study_config.study_placeholders)
        return "".join(tokens) * mm_counts.get(STUDY, 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """As many blank studies."""
        config = self.info.study_config
        with torch.device("meta"):
            shapes = config.build_tower().item_shapes
        blank = {name: torch.zeros(shapes[name]) for name in MODALITIES}
        blank["present"] = torch.ones(len(MODALITIES), dtype=torch.bool)
        return {STUDY: [blank] * mm_counts.get(STUDY, 0)}


class StudyProcessor(BaseMultiModalProcessor[StudyProcessingInfo]):
    """Stacks a study's arrays and finds its placeholders, which the prompt already holds in full.

    The order in which a prompt names the modalities travels as a processor option, so that the same study in another
    order is another item to vLLM's caches.
    """

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As of any model."""
        _, order = self._places(inputs.prompt) if inputs.mm_data_items.get(STUDY) else ([], [])
        if order != sorted(order):
            words = " ".join(map(str, order))
            inputs = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, ORDER: words})
        return super().apply(inputs, timing_ctx)

    def _places(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Where the study's placeholders are, and which of its tokens stands at each."""
        expected = self.info.study_config.study_placeholders
        kinds = set(expected)
        places = [i for i, token in enumerate(token_ids) if token in kinds][: len(expected)]
        found = torch.tensor([[token_ids[i] for i in places]])
        order = study_order(found, expected) if len(places) == len(expected) else None
        if order is None:
            raise ValueError(
                f"prompt: {len(places)} study placeholders {found[0].tolist()}, expected the {len(expected)} ids "
                f"{expected} in some order; expand <ecg>, <cxr>, <lab> exactly once, when the prompt is built: the "
                "engine does not expand them"
            )
        return places, order[0].tolist()

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        studies = hf_data["studies"]
        for study in studies:
            missing = [key for key in ITEM_KEYS if key not in study]
            if missing:
                raise ValueError(f"study item: no {missing}; expected a dict of {', '.join(ITEM_KEYS)}")
        tensors = {
            name: torch.stack([torch.as_tensor(s[name], dtype=torch.float32) for s in studies]) for name in MODALITIES
        }
        tensors["present"] = torch.stack([torch.as_tensor(s["present"], dtype=torch.bool) for s in studies])
        words = str(hf_kwargs.get(ORDER, ""))
        order = [int(word) for word in words.split()] or range(len(self.info.study_config.study_placeholders))
        tensors[ORDER] = torch.tensor([list(order)] * len(studies))
        return BatchFeature(tensors)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched(STUDY) for name in (*ITEM_KEYS, ORDER)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        # vLLM wants one update per item; _apply_prompt_updates never applies it.
        first = self.info.study_config.study_placeholders[0]
        return [PromptReplacement(modality=STUDY, target=[first], replacement=[first])]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Mapping[str, Any]
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Locates the placeholders: one span from the first to the last, with a mask of those in between.

        Those that come after the study's own are text: a completion that is scored may hold some that were sampled.
        """
        if not mm_prompt_updates.get(STUDY):
            return token_ids, {}
        positions, _ = self._places(token_ids)
        start, end = positions[0], positions[-1] + 1
        is_study = torch.zeros(end - start, dtype=torch.bool)
        is_study[[i - start for i in positions]] = True
        return token_ids, {STUDY: [PlaceholderFeaturesInfo(STUDY, 0, start, token_ids[start:end], is_study)]}


@MULTIMODAL_REGISTRY.register_processor(StudyProcessor, info=StudyProcessingInfo, dummy_inputs=StudyDummyInputs)
class MedTVTForCausalLM(nn.Module, SupportsMultiModal):
    """Study tower in front of vLLM's Llama. Weight names are those of the Hugging Face folder.

    Attributes:
        num_studies_encoded: studies that went through the tower since the start.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text that vLLM's chat front end puts in for a study; K = 1 only, longer prompts bring their own."""
        return "<ecg><cxr><lab>"

    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.num_studies_encoded = 0
        with self._mark_tower_model(vllm_config, STUDY):
            self.study_tower = config.build_tower().eval().requires_grad_(False)
        with self._mark_language_model(vllm_config), padded_heads(vllm_config.model_config.get_head_size()):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config,
                architectures=["LlamaForCausalLM"],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Soft tokens of each study in the order of its prompt's placeholders, a list of [3K, D]."""
        if "ecg" not in kwargs:
            return []
        self.num_studies_encoded += len(kwargs["ecg"])
        tokens, _ = self.study_tower(*(kwargs[name] for name in MODALITIES), kwargs["present"])
        order = kwargs[ORDER].to(tokens.device)
        return list(tokens.gather(1, order.unsqueeze(-1).expand_as(tokens)).unbind(0))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Hidden states of the scheduled tokens."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, D] -> [N, V]."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies named weights into the live parameters and buffers; the names that were loaded."""
        return AutoWeightsLoader(self).load_weights(weights)
