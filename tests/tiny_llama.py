"""A random Llama of a few thousand parameters, for tests that need a real one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# As Llama 3.2 has it, but stretched from a training on 8 positions.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8,
}


def tiny_llama(vocab_size: int, hidden_size: int = 16, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Two layers of two heads; `settings` are those of LlamaConfig. The same seed gives the same weights."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))
