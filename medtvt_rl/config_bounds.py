"""The least and the largest value of every number in a configuration, by its name.

Owns: bounds that one field knows by itself. Does not own: checks across fields (config_checks.py).
A number may be 0 (mostly: off) and not negative, unless a table here says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

ANY = {"rollout.sampling.top_k", "weight", "low", "high", "seed"}
"""A reward may weigh against, and lie below 0."""
MAY_BE_ZERO = {"evaluation.num_generators", "data.num_workers", "num_references", "encoders.batch_size"}
AT_LEAST_ONE = {
    *("steps", "epochs", "batch_size", "groups_per_step", "updates_per_batch", "keep_checkpoints", "max_attempts"),
    *("num_generators", "num_scorers", "num_workers", "num_threads"),
    *("rollout.min", "rollout.max", "tensor_parallel"),
    *("token_budget", "max_new_tokens", "max_model_len", "max_num_seqs", "block_size", "kv_cache_bytes"),
    *("max_prompts", "num_samples", "validation_samples", "validation_studies", "bootstrap_resamples"),
    *("first_steps", "equal_steps", "held_out_window", "num_train", "num_validation", "num_test"),
    *("film_size", "object_store_bytes"),
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_positions", "vocab_size"),
    *("size", "image_size", "num_channels", "patch_size", "tokens_per_modality"),
}
ABOVE_ZERO = {"learning_rate", "cap", "gradient_clipping", "restart_window_s", "fallback_after_s", "scaling_interval_s"}
"""And every deadline: what ends in timeout_s."""
SHARES = {"modality_dropout", "gpu_memory_utilization"}
"""And whatever ends in _share: at most 1."""


def numbers(settings: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a tree of dataclasses and of dictionaries of them, with its key; free options are left out."""
    for one in fields(settings):
        key, value = f"{prefix}{one.name}", getattr(settings, one.name)
        if is_dataclass(value):
            yield from numbers(value, f"{key}.")
        elif isinstance(value, dict):
            for name, each in value.items():
                if is_dataclass(each):
                    yield from numbers(each, f"{key}.{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def fault(key: str, value: float) -> str | None:
    """What a number of that key was expected to be, where it is not."""
    name = key.rpartition(".")[2]
    share = name.endswith("_share") or name in SHARES
    if key in ANY or name in ANY:
        return None
    if key not in MAY_BE_ZERO:
        if (name in AT_LEAST_ONE or key in AT_LEAST_ONE) and value < 1:
            return "set at least 1"
        if (name in ABOVE_ZERO or name.endswith("timeout_s")) and not value > 0:
            return "set more than 0"
    if not value >= 0:
        return "it can't be negative; set 0 or more"
    if share and value > 1:
        return "it is a share; set 0 to 1"
    return None


def are_betas(values: Sequence[float]) -> bool:
    """Whether these are the two decay rates of Adam's moments."""
    return len(values) == 2 and all(0 <= value < 1 for value in values)
