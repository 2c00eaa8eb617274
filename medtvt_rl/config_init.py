"""What a model folder decides: where `model.init` names a tri-modal one, its tower is the run's, and its attention
heads say over how many GPUs an engine can be spread.

Owns: taking over the tower, and the errors where the configuration contradicts the folder. Does not own: loading the
model (model/build.py, model/policy.py). Importable without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from medtvt_rl.config_checks import ConfigError

if TYPE_CHECKING:
    from medtvt_rl.config import Config

SECTIONS = ("ecg", "cxr", "lab", "perception")


def check_heads(heads: object, tensor_parallel: int, model: str) -> None:
    """Raises ConfigError where an engine's workers cannot each take as many attention heads; unknown heads pass."""
    if isinstance(heads, int) and tensor_parallel > 0 and heads % tensor_parallel:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ConfigError(
            f"rollout.tensor_parallel is {tensor_parallel}: {model} has {heads} attention heads, which do not divide "
            f"by it; set one of {fitting}"
        )


def take_over_folder(config: Config) -> None:
    """Fills model.ecg, model.cxr, model.lab and model.perception from the folder, where they are at their defaults.

    Raises:
        ConfigError: a setting is another than the folder's, or the folder has no tokenizer.
    """
    if config.model.init is None or not (Path(config.model.init) / "config.json").is_file():
        return
    folder = Path(config.model.init)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.init is {config.model.init!r}: its config.json cannot be read: {error}") from error
    check_heads(found.get("num_attention_heads"), config.rollout.tensor_parallel, f"the model in {folder}")
    if found.get("model_type") != "medtvt":
        return
    for section in SECTIONS:
        settings = getattr(config.model, section)
        defaults = type(settings)()
        for name, value in (found.get(section) or {}).items():
            given = getattr(settings, name, value)
            if given not in (value, getattr(defaults, name, value)):
                raise ConfigError(
                    f"model.{section}.{name} is {given!r}: the model in {folder} was built with {value!r}; leave it out"
                )
            setattr(settings, name, value)
    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"model.init is {config.model.init!r}: it has no tokenizer; save one into it, or import the checkpoint "
            "again with --tokenizer"
        )
    longest, limit = config.rollout.engine.max_model_len, found.get("max_position_embeddings", 0)
    if longest > limit > 0:
        raise ConfigError(
            f"rollout.engine.max_model_len is {longest}: the model in {folder} has {limit} positions; lower it"
        )
