"""The tokenizer: one trained on the task's texts, or a pre-trained one with the task's tokens added.

Owns: vocabulary, special tokens, chat template. Does not own: what a prompt holds (task.py). `<think>` and its kin
are added tokens but not special ones, so that decoding with skip_special_tokens=True leaves the text that rewards
parse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medtvt_rl.config import Config
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.unreadable import why_unreadable

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
USER, ASSISTANT = "<user>", "<assistant>"
TEXT_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT)
MODALITY_TOKENS = {"ecg": "<ecg>", "cxr": "<cxr>", "lab": "<lab>"}
ANSWER_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

CHAT_DATE = datetime(2024, 7, 26)
"""The day that chat templates are told who ask for today's, so that a prompt is the same on every day; the one that
Llama 3.2's takes where there is no clock."""
FILES = ("tokenizer.json", "tokenizer_config.json")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `vocab_size` tokens, special and added ones included.

    Raises:
        ValueError: the vocabulary cannot hold the 256 bytes and the task's tokens.
    """
    special = [*TEXT_TOKENS, *MODALITY_TOKENS.values()]
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(special) + len(ANSWER_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"model.backbone.vocab_size is {vocab_size}, expected at least {smallest}: bytes and task tokens"
        )
    tokenizer = _byte_level(_without_tokens(texts), vocab_size - len(ANSWER_TOKENS), special)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ANSWER_TOKENS])
    return _with_chat(tokenizer, special)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of plain text whose tokens are single bytes, so that it needs no texts to learn from."""
    size = len(pre_tokenizers.ByteLevel.alphabet()) + len(TEXT_TOKENS)
    return _with_chat(_byte_level((), size, TEXT_TOKENS), TEXT_TOKENS)


def _byte_level(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _with_chat(tokenizer: Tokenizer, special: Sequence[str]) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(special[3:]),
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _without_tokens(texts: Iterable[str]) -> Iterator[str]:
    """The pieces between the task's tokens, as the tokenizer itself cuts them."""
    for text in texts:
        for token in (*ANSWER_TOKENS, *MODALITY_TOKENS.values()):
            text = text.replace(token, "\0")
        yield from (piece for piece in text.split("\0") if piece)


def build_tokenizer(config: Config, store: StudyStore) -> PreTrainedTokenizerFast:
    """A run's tokenizer: that of config.model.init with the task's tokens, or one trained on the training split."""
    if config.model.init is not None:
        return adapt_tokenizer(cast(PreTrainedTokenizerFast, load_tokenizer(config.model.init, "model.init")))
    texts = (text for kind in QA_KINDS for qa in store.qa("train", kind) for text in (qa.question, qa.answer))
    return train_tokenizer(texts, config.model.backbone.vocab_size)


def load_tokenizer(folder: str | Path, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder.

    Args:
        key: the setting that names the folder.

    Raises:
        ValueError: it cannot be loaded; the message names the damaged file.
    """
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # `tokenizers` raises a bare Exception for a damaged file
        damaged = next((path for name in FILES if _is_damaged(path := Path(folder) / name)), Path(folder))
        raise ValueError(
            f"{key}: no tokenizer can be loaded from {damaged} {why_unreadable(damaged, error)}"
        ) from error


def _is_damaged(path: Path) -> bool:
    try:
        return path.is_file() and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return True


def adapt_tokenizer(tokenizer: PreTrainedTokenizerFast, answer_tokens: bool = True) -> PreTrainedTokenizerFast:
    """Adds the task's tokens that a pre-trained tokenizer lacks, a pad token of its own, and a chat template; the end
    token becomes that of the chat's turns.

    Args:
        answer_tokens: add `<think>` and its kin. A tokenizer that holds <ecg>, <cxr> and <lab> was made for a model
            that reads them, and gets none: there they are text.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "model.init: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    tokenizer = _with_plain_answers(tokenizer)
    vocabulary = tokenizer.get_vocab()
    answer_tokens = answer_tokens and not vocabulary.keys() >= set(MODALITY_TOKENS.values())
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in MODALITY_TOKENS.values()
            if token not in vocabulary
        ],
        special_tokens=True,
    )
    if answer_tokens:
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=False) for token in ANSWER_TOKENS if token not in vocabulary]
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if tokenizer.chat_template is None:
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=True) for token in (USER, ASSISTANT)], special_tokens=True
        )
        tokenizer.chat_template = CHAT_TEMPLATE if tokenizer.bos_token else CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    else:
        _end_as_the_chat_does(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _end_as_the_chat_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes the special token that the chat template puts behind an answer the end token: answers stop there."""
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ANSWER_TOKENS[-1]}]
    text = chat_text(tokenizer, messages)
    behind = tokenizer.encode(text.rpartition(ANSWER_TOKENS[-1])[2].lstrip(), add_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    if behind and behind[0] in added and added[behind[0]].special:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(behind[0])


def _with_plain_answers(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, in which `<think>` and its kin are not special: as special ones decoding would drop them, and no
    answer could be read."""
    if not any(token.special and token.content in ANSWER_TOKENS for token in tokenizer.added_tokens_decoder.values()):
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in content["added_tokens"]:
        entry["special"] = entry["special"] and entry["content"] not in ANSWER_TOKENS
    return rebuilt(tokenizer, content)


def rebuilt(tokenizer: PreTrainedTokenizerFast, content: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer of this content with the other's named tokens, template and settings."""
    named = {name: str(getattr(tokenizer, name)) for name in NAMED if getattr(tokenizer, name) is not None}
    result = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=tokenizer.model_max_length,
        **named,
    )
    result.chat_template = tokenizer.chat_template
    return result


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
) -> str:
    """The chat template around the messages; whatever day it asks for, it is told CHAT_DATE."""
    return cast(
        str,
        tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=CHAT_DATE.strftime("%d %b %Y"),
            strftime_now=CHAT_DATE.strftime,
        ),
    )


def answer_lead(tokenizer: Any) -> str:
    """White space that the chat template puts before an answer, behind what a prompt ends with: the model writes it."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    question = [{"role": "user", "content": "Why?"}]
    answered = chat_text(tokenizer, [*question, {"role": "assistant", "content": "Because."}])
    prompt = chat_text(tokenizer, question, add_generation_prompt=True)
    lead = answered.removeprefix(prompt).partition("Because.")[0]
    return lead if lead.isspace() else ""


def stop_token_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """What ends an answer: the tokenizer's end token, and those of the model's generation_config.json, as in vLLM."""
    stops = getattr(generation_config, "eos_token_id", None)
    listed = list(stops) if isinstance(stops, list | tuple) else [stops]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def modality_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Modality -> id of its placeholder. Raises ValueError for a tokenizer that lacks one."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in MODALITY_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"tokenizer: no token {', '.join(missing)}; add them as special tokens")
    return {modality: vocabulary[token] for modality, token in MODALITY_TOKENS.items()}
