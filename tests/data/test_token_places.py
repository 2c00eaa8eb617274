"""Tokens of a tokenizer at the ids that a checkpoint was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medtvt_rl.data.special_tokens import PUBLISHED_TOKENS, check_special_tokens, read_special_tokens
from medtvt_rl.data.task import prompt_token_ids
from medtvt_rl.data.token_places import with_places, write_tokenizer
from medtvt_rl.data.tokenizer import ANSWER_TOKENS, adapt_tokenizer, answer_lead, train_tokenizer
from medtvt_rl.rewards.jaccard import jaccard_reward

STOCK = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 24)),
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
# The published order behind 256 tokens of text.
TOKENS = {name: token - 128_000 + 256 for name, token in PUBLISHED_TOKENS.items()}
THREE = {"<ecg>": 317, "<cxr>": 318, "<lab>": 319}


def llama_like(num_reserved: int = 21) -> PreTrainedTokenizerFast:
    """As the stock Llama 3 tokenizer is laid out: text, then special tokens in another order than the published."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(STOCK[: 11 + num_reserved]))
    start = processors.TemplateProcessing(
        single="<|end_of_text|> $A", pair=None, special_tokens=[("<|end_of_text|>", 257)]
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **named)


def test_the_published_ids_reached_from_the_stock_order(tmp_path: Path) -> None:
    source = llama_like()
    text = source.encode("the lungs are clear", add_special_tokens=False)
    source.save_pretrained(tmp_path / "stock")
    (tmp_path / "out").mkdir()
    ids, left_out = write_tokenizer(
        tmp_path / "stock", tmp_path / "out", TOKENS, num_rows=288, keep_template=True, answer_tokens=True
    )
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {name: found.convert_tokens_to_ids(name) for name in TOKENS} == TOKENS
    assert len(found) == 288 and all("reserved" in name for name in left_out)
    assert found.encode("the lungs are clear", add_special_tokens=False) == text
    assert ids == {"bos_token_id": 256, "eos_token_id": TOKENS["<|eot_id|>"], "pad_token_id": found.pad_token_id}
    assert found.pad_token_id not in (None, found.eos_token_id) and found.pad_token_id < 288
    prompt = found.apply_chat_template([{"role": "user", "content": "<ecg><cxr><lab>x"}], tokenize=False)
    encoded = found.encode(prompt, add_special_tokens=False)
    assert encoded[:2] == [256, TOKENS["<|start_header_id|>"]]
    assert [i for i in encoded if i in (262, 263, 264)] == [262, 263, 264]
    answer = found.encode("<think>a</think><|eot_id|>", add_special_tokens=False)
    assert found.decode(answer, skip_special_tokens=True) == "<think>a</think>"


QUESTION = "Read <ecg> then the film <cxr> and <lab>"
ANSWER = "<think> a </think> <answer> Sepsis </answer>"


@pytest.fixture
def published(tmp_path: Path) -> PreTrainedTokenizerFast:
    """The stock tokenizer as an import leaves it."""
    llama_like().save_pretrained(tmp_path / "stock")
    (tmp_path / "out").mkdir()
    ids, _ = write_tokenizer(tmp_path / "stock", tmp_path / "out", TOKENS, num_rows=288)
    assert ids["eos_token_id"] == TOKENS["<|end_of_text|>"]
    return AutoTokenizer.from_pretrained(tmp_path / "out")


def test_a_prompt_is_what_the_published_model_was_trained_on(published: PreTrainedTokenizerFast) -> None:
    def text(words: str) -> list[int]:
        return published.encode(words, add_special_tokens=False)

    expected = [TOKENS["<|begin_of_text|>"], *text("Read "), TOKENS["<ecg>"], *text(" then the film ")]
    expected += [TOKENS["<cxr>"], *text(" and "), TOKENS["<lab>"]]
    assert prompt_token_ids(published, QUESTION, 1).tolist() == expected
    in_front = [TOKENS[name] for name in ("<|begin_of_text|>", "<ecg>", "<cxr>", "<lab>")]
    assert prompt_token_ids(published, "Why?", 1).tolist() == [*in_front, *text("Why?")]
    assert answer_lead(published) == " "
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    whole = published.apply_chat_template(messages, tokenize=False)
    assert text(whole) == [*expected, *text(" " + ANSWER), TOKENS["<|end_of_text|>"]]


def test_answer_tags_are_text_to_an_imported_tokenizer(published: PreTrainedTokenizerFast) -> None:
    ids = published.encode(ANSWER, add_special_tokens=False)
    assert len(ids) == len(ANSWER), "a byte each"
    assert published.decode(ids, skip_special_tokens=True) == ANSWER
    assert not set(ANSWER_TOKENS) & published.get_vocab().keys()
    assert adapt_tokenizer(published).encode(ANSWER, add_special_tokens=False) == ids, "also where a run goes on"


@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\n", '{"version": "1.0", "added_', "{}"]
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    llama_like().save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "tokenizer.json").write_text(content)
    where = "stock" if content == "{}" else r"tokenizer\.json"
    with pytest.raises(ValueError, match=rf"--tokenizer: no tokenizer can be loaded from .*{where} \(.*copy") as caught:
        write_tokenizer(tmp_path / "stock", tmp_path / "out", TOKENS, num_rows=288)
    assert ("git lfs pull" in str(caught.value)) == content.startswith("version") and "\n" not in str(caught.value)


@pytest.mark.parametrize("answer_tokens", [True, False])
def test_answer_tags_that_are_special_are_read_all_the_same(tmp_path: Path, answer_tokens: bool) -> None:
    source = llama_like()
    source.add_special_tokens({"additional_special_tokens": list(ANSWER_TOKENS)})
    assert "think" not in source.decode(source.encode(ANSWER), skip_special_tokens=True)
    moved, _ = with_places(source, TOKENS, num_rows=310, answer_tokens=answer_tokens)
    moved.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("<think>", "</answer>"):
        assert (found.encode(name, add_special_tokens=False) == [TOKENS[name]]) == answer_tokens
    assert jaccard_reward(found.decode(found.encode(ANSWER), skip_special_tokens=True), "Sepsis") == 1.0


def test_ids_in_a_post_processor_follow() -> None:
    moved, _ = with_places(llama_like(), TOKENS | {"<|end_of_text|>": 270}, num_rows=300)
    assert moved.encode("a")[0] == moved.convert_tokens_to_ids("<|end_of_text|>") == 270


def test_a_trained_tokenizer_has_its_tokens_moved_out_of_the_text() -> None:
    source = train_tokenizer(["What is it?"] * 3, 290)
    before = source.encode("What <think> it")
    assert source.encode("<ecg><cxr><lab>") != [317, 318, 319]
    moved, left_out = with_places(source, THREE, num_rows=320)
    assert moved.encode("<ecg><cxr><lab>") == [317, 318, 319] and left_out == ()
    assert moved.encode("What <think> it") == before and len(moved) == 320


def test_a_tokenizer_that_fits_is_as_it_was() -> None:
    source = train_tokenizer(["What is it?"] * 3, 290)
    tokens = {name: source.convert_tokens_to_ids(name) for name in THREE}
    vocabulary = source.get_vocab()
    moved, _ = with_places(source, tokens, num_rows=320)
    assert moved.get_vocab() == vocabulary


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the text"):
        with_places(llama_like(), {**THREE, "<ecg>": 100}, num_rows=320)
    with pytest.raises(ValueError, match="embedding table has 200 rows"):
        trained = train_tokenizer(["What is it?"], 290)
        with_places(trained, {name: trained.convert_tokens_to_ids(name) for name in THREE}, num_rows=200)
    with pytest.raises(ValueError, match="none is left for"):
        with_places(llama_like(0), {"<ecg>": 262, "<cxr>": 263, "<lab>": 264}, num_rows=267)
    with pytest.raises(ValueError, match=r"holds no tokenizer_config\.json"):
        write_tokenizer(tmp_path, tmp_path, THREE, 320)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<ecg>": 1, "<cxr>": 2}, "no id of <lab>"),
        ({"<ecg>": 1, "<cxr>": 2, "<lab>": 9}, "<lab> is 9, and .* has 9 rows"),
        ({"<ecg>": 1, "<cxr>": 2, "<lab>": "3"}, "<lab> is '3'"),
        ({"<ecg>": 1, "<cxr>": 2, "<lab>": 2}, "<cxr> and <lab> both have the id 2"),
        ([1, 2, 3], "expected an object"),
    ],
)
def test_special_tokens_are_checked(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_special_tokens(read_special_tokens(path), num_rows=9)


def test_the_published_ids() -> None:
    assert [PUBLISHED_TOKENS[name] for name in ("<ecg>", "<cxr>", "<lab>", "<|eot_id|>")] == [
        128006,
        128007,
        128008,
        128011,
    ]
