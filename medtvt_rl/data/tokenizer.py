"""The tokenizer: one trained on the task's texts, or a pre-trained one with the task's tokens added.

Owns: vocabulary, special tokens, chat template. Does not own: what a prompt holds (task.py). `<think>` and its kin
are added tokens but not special ones, so that decoding with skip_special_tokens=True leaves the text that rewards
parse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medtvt_rl.config import Config
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.study_store import StudyStore

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
USER, ASSISTANT = "<user>", "<assistant>"
TEXT_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT)
MODALITY_TOKENS = {"ecg": "<ecg>", "cxr": "<cxr>", "lab": "<lab>"}
ANSWER_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

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
    """The pieces between answer tokens, as the tokenizer itself cuts them."""
    for text in texts:
        for token in ANSWER_TOKENS:
            text = text.replace(token, "\0")
        yield from (piece for piece in text.split("\0") if piece)


def build_tokenizer(config: Config, store: StudyStore) -> PreTrainedTokenizerFast:
    """A run's tokenizer: that of config.model.init with the task's tokens, or one trained on the training split."""
    if config.model.init is not None:
        return adapt_tokenizer(cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(config.model.init)))
    texts = (text for kind in QA_KINDS for qa in store.qa("train", kind) for text in (qa.question, qa.answer))
    return train_tokenizer(texts, config.model.backbone.vocab_size)


def adapt_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds the task's tokens that a pre-trained tokenizer lacks, a pad token of its own, and a chat template; the end
    token becomes that of the chat's turns."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "model.init: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in MODALITY_TOKENS.values()
            if token not in vocabulary
        ],
        special_tokens=True,
    )
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
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    behind = tokenizer.encode(text.rpartition(ANSWER_TOKENS[-1])[2].lstrip(), add_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    if behind and behind[0] in added and added[behind[0]].special:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(behind[0])


def modality_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Modality -> id of its placeholder. Raises ValueError for a tokenizer that lacks one."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in MODALITY_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"tokenizer: no token {', '.join(missing)}; add them as special tokens")
    return {modality: vocabulary[token] for modality, token in MODALITY_TOKENS.items()}
