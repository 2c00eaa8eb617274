"""Checksums of what a stage is trained from and on: of content, wherever it lies.

Owns: the checksums of model folder, prompts and items. Does not own: that of supervised examples
(medtvt_rl/learner/examples.py), what is made of a difference (resume.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medtvt_rl.config import Config
from medtvt_rl.model.seal import SEAL
from medtvt_rl.storage import digest_of
from medtvt_rl.types import Prompt
from medtvt_rl.user_code import task_items

THREADS = 4
WITH_VERSION = ("config.json", "generation_config.json")


def identity_of(config: Config, model_folder: Path, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Model and tokenizer, prompts in their order, and the items behind them."""
    return {**model_and_items(config, model_folder), "prompts": _of_prompts(prompts)}


def model_and_items(config: Config, model_folder: Path) -> dict[str, str]:
    """Model and tokenizer, and the task's items where their source has a method `fingerprint() -> str`."""
    found = {"model": _of_folder(model_folder)}
    items = task_items(config)
    fingerprint = items.fingerprint() if hasattr(items, "fingerprint") else None
    if fingerprint is not None:
        found["items"] = fingerprint
    return found


def _of_folder(folder: Path) -> str:
    """Names and contents of the files of a model folder, an adapter beside the weights included, without the version of
    the library that wrote them; weights are large, and hashing lets other threads run."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted(name for name in files if name != SEAL and not any(part.startswith(".") for part in name.split("/")))
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_digest, (files[name] for name in names)))
    return _checksum([[name, *digest] for name, digest in zip(names, digests)])


def _digest(path: Path) -> Sequence[Any]:
    if path.name not in WITH_VERSION:
        return digest_of(path)
    content = json.loads(path.read_bytes())
    content.pop("transformers_version", None)
    return [_checksum(content)]


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    return _checksum([[p.prompt_id, p.token_ids.tolist(), p.item_id, p.ground_truth] for p in prompts])


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
