"""Tokens that have an id of their own in the published checkpoints. Importable without torch and transformers.

Owns: the published ids and form of a prompt, and reading and checking other ids. Does not own: tokenizers
(token_places.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

REQUIRED = ("<ecg>", "<cxr>", "<lab>")
# After the 128,000 base tokens of Llama 3. What follows is reserved.
PUBLISHED_TOKENS: dict[str, int] = {
    name: 128_000 + place
    for place, name in enumerate(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            *REQUIRED,
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        )
    )
}

END_OF_TEXT = "<|end_of_text|>"
# A question as it is, a space, the answer: the published model was trained and evaluated without turns.
PUBLISHED_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def read_special_tokens(path: Path) -> dict[str, int]:
    """Token -> id from json. Raises ValueError naming the file where it isn't that."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable json file ({error}); check the path") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of token -> id, found {type(content).__name__}")
    return content


def check_special_tokens(tokens: Mapping[str, int], num_rows: int) -> None:
    """Raises ValueError where one of <ecg>, <cxr>, <lab> is missing, or an id is none of the embedding table's rows."""
    missing = [name for name in REQUIRED if name not in tokens]
    if missing:
        raise ValueError(f"special tokens: no id of {', '.join(missing)}; the file maps <ecg>, <cxr>, <lab> to ids")
    seen: dict[int, str] = {}
    for name, token in tokens.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < num_rows:
            raise ValueError(
                f"special tokens: the id of {name} is {token!r}, and the checkpoint's embedding table has {num_rows} "
                "rows; give --special-tokens a file of its own ids"
            )
        if token in seen:
            raise ValueError(f"special tokens: {seen[token]} and {name} both have the id {token}; give each its own")
        seen[token] = name
