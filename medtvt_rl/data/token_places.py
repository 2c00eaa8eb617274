"""Gives the tokens of a tokenizer the ids that a checkpoint was trained with.

Owns: which token has which id. Does not own: which ids a checkpoint has (special_tokens.py), or what a task's
tokenizer must hold (tokenizer.py). The stock Llama 3 tokenizer, for one, has `<|start_header_id|>` where the published
model has `<ecg>`. Text keeps its ids; only added tokens move, and reserved ones make room for the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from medtvt_rl.data.special_tokens import END_OF_TEXT, PUBLISHED_TEMPLATE
from medtvt_rl.data.tokenizer import ANSWER_TOKENS, NAMED, adapt_tokenizer, load_tokenizer, rebuilt

RESERVED = re.compile(r"reserved|unused")


def write_tokenizer(
    source: Path,
    target: Path,
    tokens: Mapping[str, int],
    num_rows: int,
    keep_template: bool = False,
    answer_tokens: bool = False,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Writes the tokenizer of the folder `source` to `target`, its tokens at these ids, with what the task needs.

    Args:
        keep_template: its own chat template and end token stay; otherwise they become the published ones.
        answer_tokens: `<think>` and its kin are tokens; otherwise text, as the published model read them.

    Returns:
        ids of bos, eos and pad, under the names of a model's configuration, and the reserved tokens that were left out.

    Raises:
        ValueError: `source` is no folder of a fast tokenizer, or its tokens cannot be given these ids.
    """
    if not (source / "tokenizer_config.json").is_file():
        raise ValueError(f"--tokenizer: {source} holds no tokenizer_config.json; expected a Hugging Face folder")
    loaded = load_tokenizer(source, "--tokenizer")
    if not getattr(loaded, "is_fast", False):
        raise ValueError(f"--tokenizer: {source} holds no tokenizer.json; save it as a fast tokenizer")
    if loaded.eos_token_id is None:
        raise ValueError(f"--tokenizer: {source} has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if not keep_template:
        loaded.chat_template = PUBLISHED_TEMPLATE
        loaded.eos_token = END_OF_TEXT if END_OF_TEXT in loaded.get_vocab() else loaded.eos_token
    tokenizer, left_out = with_places(cast(PreTrainedTokenizerFast, loaded), tokens, num_rows, answer_tokens)
    tokenizer.save_pretrained(target)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in NAMED[:3]}
    return {name: token for name, token in ids.items() if token is not None}, left_out


def with_places(
    tokenizer: PreTrainedTokenizerFast, tokens: Mapping[str, int], num_rows: int, answer_tokens: bool = True
) -> tuple[PreTrainedTokenizerFast, tuple[str, ...]]:
    """The tokenizer with these tokens at these ids and all others below `num_rows`, and the reserved tokens left out.

    Args:
        answer_tokens: `<think>` and its kin are tokens; otherwise they become text, and their ids are not given out.

    Raises:
        ValueError: an id belongs to text, or there are more tokens than rows.
    """
    tokenizer = adapt_tokenizer(tokenizer, answer_tokens)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError(
            f"--tokenizer: a model of type {content['model'].get('type')!r}, expected one with a vocabulary (BPE)"
        )
    added = {entry["content"]: entry for entry in content["added_tokens"]}
    if not answer_tokens:
        tokens = {name: place for name, place in tokens.items() if name not in ANSWER_TOKENS}
        _make_text(vocabulary, added)
    text_size = 1 + max(vocabulary.values(), default=-1)
    _vacate(vocabulary, added, tokens)
    places, left_out = _places(
        {entry["content"]: entry["id"] for entry in added.values()}, vocabulary, tokens, text_size, num_rows
    )
    content["added_tokens"] = [
        {**_token(name, added), "id": place} for place, name in sorted((p, n) for n, p in places.items())
    ]
    _renumber(content.get("post_processor"), {**vocabulary, **places})
    result = rebuilt(tokenizer, content)
    wrong = {name: result.encode(name, add_special_tokens=False) for name in tokens}
    wrong = {name: ids for name, ids in wrong.items() if ids != [tokens[name]]}
    if wrong or len(result) > num_rows:
        raise ValueError(
            f"--tokenizer: after giving out ids it still reads {wrong or len(result)}; use another tokenizer"
        )
    return result, left_out


def _make_text(vocabulary: dict[str, int], added: dict[str, dict[str, Any]]) -> None:
    """Takes `<think>` and its kin out of the tokens."""
    for name in ANSWER_TOKENS:
        added.pop(name, None)
        if name in vocabulary:
            place = vocabulary.pop(name)
            vocabulary[f"<|unused_{place}|>"] = place


def _vacate(vocabulary: dict[str, int], added: dict[str, dict[str, Any]], tokens: Mapping[str, int]) -> None:
    """Takes tokens that move out of the model's own vocabulary, where special tokens of a trained one lie, too."""
    for name, wanted in tokens.items():
        if vocabulary.get(name, wanted) != wanted:
            old = vocabulary.pop(name)
            vocabulary[f"<|unused_{old}|>"] = old
    at = {place: name for name, place in vocabulary.items()}
    for name, wanted in tokens.items():
        found = at.get(wanted, name)
        if found != name:
            if found not in added and not RESERVED.search(found):
                raise ValueError(
                    f"--tokenizer: id {wanted}, which {name} has in the checkpoint, is the text {found!r}; is it the "
                    "tokenizer of that model?"
                )
            vocabulary[name] = vocabulary.pop(found)


def _places(
    added: dict[str, int], vocabulary: dict[str, int], tokens: Mapping[str, int], text_size: int, num_rows: int
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Added token -> id, without gaps behind the text, and the reserved tokens for which there is no row.

    Tokens keep their ids where these are free; others go to free ids, then to those of reserved tokens.
    """
    if text_size > num_rows:
        raise ValueError(f"--tokenizer: {text_size} tokens, and the checkpoint's embedding table has {num_rows} rows")
    inside = {name: vocabulary[name] for name in (*added, *tokens) if name in vocabulary}
    taken = {place: name for name, place in tokens.items() if place >= text_size}
    homeless = []
    for name, place in sorted(added.items(), key=lambda item: item[1]):
        if name in tokens or name in inside:
            continue
        if text_size <= place < num_rows and place not in taken:
            taken[place] = name
        else:
            homeless.append(name)
    needed = [name for name in homeless if not RESERVED.search(name)]
    free = [place for place in range(text_size, num_rows) if place not in taken]
    free += [place for place, name in sorted(taken.items()) if RESERVED.search(name)]
    if len(needed) > len(free):
        raise ValueError(
            f"--tokenizer: the checkpoint's embedding table has {num_rows} rows, and none is left for "
            f"{', '.join(needed[len(free) :])}"
        )
    taken |= dict(zip(free, needed))
    left_out = tuple(name for name in added if name not in inside and name not in taken.values())
    for place in range(text_size, max(taken, default=text_size)):
        taken.setdefault(place, f"<|unused_{place}|>")
    return {**inside, **{name: place for place, name in taken.items()}}, left_out


def _token(name: str, added: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`<think>` and its kin are never special, so that decoding with skip_special_tokens=True leaves them."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entry = added.get(name, {"content": name, **flags, "special": True})
    return {**entry, "special": entry["special"] and name not in ANSWER_TOKENS}


def _renumber(part: Any, ids: Mapping[str, int]) -> None:
    """Corrects the ids that a post-processor holds beside tokens, in place."""
    if isinstance(part, list):
        for one in part:
            _renumber(one, ids)
    elif isinstance(part, dict):
        if isinstance(part.get("tokens"), list) and isinstance(part.get("ids"), list):
            part["ids"] = [ids.get(name, old) for name, old in zip(part["tokens"], part["ids"])]
        for name in ("sep", "cls"):
            if isinstance(part.get(name), list) and len(part[name]) == 2 and part[name][0] in ids:
                part[name][1] = ids[part[name][0]]
        for one in part.values():
            _renumber(one, ids)
