"""Settings of sampling and of the rollout engine. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SamplingConfig:
    """How a completion is drawn. Sampling and scoring describe one distribution: top_p = 1 and top_k = -1.

    Attributes:
        temperature: divides the logits, in the engine and wherever log-probs are computed.
        max_new_tokens: a completion longer than this is cut, and marked so.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 96


@dataclass
class EngineConfig:
    """Settings handed to vLLM.

    Attributes:
        dtype: of weights and activations; float32 where engine and learner must agree to 1e-4.
        kv_cache_bytes: KV cache on a CPU; on GPUs `gpu_memory_utilization` rules.
        block_size: tokens per KV block; a multiple of 32 on a CPU.
        num_threads: OpenMP threads of one engine.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = 256
    max_num_seqs: int = 128
    block_size: int = 32
    kv_cache_bytes: int = 268435456
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    enforce_eager: bool = True
    num_threads: int = 1


@dataclass
class RolloutConfig:
    """The rollout generators.

    Attributes:
        on_update: what happens to requests in flight when new weights arrive.
        start_timeout_s, generate_timeout_s, update_timeout_s: deadlines of the calls, seconds.
    """

    num_generators: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    on_update: Literal["continue", "finish", "restart"] = "continue"
    start_timeout_s: float = 300.0
    generate_timeout_s: float = 300.0
    update_timeout_s: float = 60.0
