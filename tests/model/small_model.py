"""Small models, items and prompts that tests of model and engine share."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medtvt_rl.model.build import build_model
from medtvt_rl.model.config import BackboneConfig, CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig, ModelConfig
from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.types import Prompt

SPECIAL = ("<pad>", "<bos>", "<eos>", "<ecg>", "<cxr>", "<lab>", "<unk>")
NUM_WORDS = 57
CXR_SIZE = 32


def small_tokenizer(num_words: int = NUM_WORDS) -> PreTrainedTokenizerFast:
    """Words w0..; <pad> 0, <bos> 1, <eos> 2, <ecg> 3, <cxr> 4, <lab> 5."""
    words = (*SPECIAL, *(f"w{i}" for i in range(num_words)))
    words_model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    core = Tokenizer(words_model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<ecg>", "<cxr>", "<lab>"],
    )


def small_config(tokens_per_modality: int = 2, tie: bool = True) -> ModelConfig:
    """A model of 60 thousand parameters."""
    config = ModelConfig(
        backbone=BackboneConfig(
            hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=96, tie_embeddings=tie
        ),
        ecg=EcgEncoderConfig(widths=[8, 8, 8, 8]),
        cxr=CxrEncoderConfig(widths=[4, 8, 8], image_size=CXR_SIZE),
        lab=LabEncoderConfig(widths=[16, 16]),
    )
    config.perception.tokens_per_modality = tokens_per_modality
    return config


def small_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> MedTVTForCausalLM:
    """Weights large enough for items and prompts to matter, BatchNorm statistics away from their start."""
    torch.manual_seed(seed)
    model = build_model(config, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "stand_in" in name:
                parameter.mul_(3.0)
            elif name.endswith("norm.weight") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


def random_item(seed: int, present: tuple[bool, bool, bool] = (True, True, True)) -> dict[str, np.ndarray]:
    """An item as the task makes it: zeros where a modality is missing."""
    rng = np.random.default_rng(seed)
    item = {
        "ecg": rng.standard_normal((12, 1000), dtype=np.float32),
        "cxr": rng.standard_normal((1, CXR_SIZE, CXR_SIZE), dtype=np.float32),
        "lab": rng.random(100, dtype=np.float32),
    }
    for name, there in zip(("ecg", "cxr", "lab"), present):
        if not there:
            item[name] = np.zeros_like(item[name])
    return item | {"present": np.array(present)}


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stacks items to tensors."""
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}


def study_prompt(seed: int, tokens_per_modality: int = 2, length: int = 6) -> Prompt:
    """<bos>, the placeholders, then random words."""
    rng = np.random.default_rng(seed)
    study = [token for token in (3, 4, 5) for _ in range(tokens_per_modality)]
    words = rng.integers(len(SPECIAL), len(SPECIAL) + NUM_WORDS, length)
    return Prompt(
        prompt_id=f"p{seed}",
        token_ids=np.array([1, *study, *words], dtype=np.int32),
        item_id=f"s{seed}",
        ground_truth="",
    )
