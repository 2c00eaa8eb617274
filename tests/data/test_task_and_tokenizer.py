"""Prompts, items, ablations, and the tokenizer they need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from medtvt_rl.config import Config
from medtvt_rl.data.config import FilmConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.patient import read_patient
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.task import StudyItems, diagnosis_prompts, prompt_token_ids, qa_prompts, study_item, without
from medtvt_rl.data.tokenizer import (
    ANSWER_TOKENS,
    MODALITY_TOKENS,
    adapt_tokenizer,
    build_tokenizer,
    modality_token_ids,
    stop_token_ids,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(config: Config, store: StudyStore) -> PreTrainedTokenizerFast:
    return build_tokenizer(config, store)


def complete_id(store: StudyStore) -> str:
    return next(i for i in store.study_ids("train") if all(store.study(i).present))


def test_texts_survive_decoding_without_special_tokens(store: StudyStore, tokenizer: PreTrainedTokenizerFast) -> None:
    for example in store.qa("test", "diagnosis"):
        ids = tokenizer.encode(example.answer, add_special_tokens=False)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == example.answer
        assert len(ids) < 96
    odd = "Ätiologie: 42 % <b> naïve\n\tok"
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) == odd


def test_task_tokens_are_single_and_pad_is_not_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in (*ANSWER_TOKENS, *MODALITY_TOKENS.values(), "<pad>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and len(tokenizer) <= 700
    special = set(tokenizer.all_special_tokens)
    assert special >= set(MODALITY_TOKENS.values()) and not special & set(ANSWER_TOKENS)


def test_a_tokenizer_survives_its_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<think> ECG: peaked T waves. </think><answer> Sepsis </answer>"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    np.testing.assert_array_equal(prompt_token_ids(loaded, "Why?", 2), prompt_token_ids(tokenizer, "Why?", 2))
    assert modality_token_ids(loaded) == modality_token_ids(tokenizer)
    assert loaded.decode(loaded.encode(text, add_special_tokens=False), skip_special_tokens=True) == text


def test_a_vocabulary_too_small_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.backbone\.vocab_size is 200, expected at least 268"):
        train_tokenizer(["text"], 200)


def test_a_foreign_tokenizer_is_adapted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(["a b"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|end|>"]))
    foreign = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>", pad_token="<|end|>")
    adapted = adapt_tokenizer(foreign)
    assert adapted.pad_token_id != adapted.eos_token_id
    assert (prompt_token_ids(adapted, "Why?", 3) == modality_token_ids(adapted)["cxr"]).sum() == 3
    size = len(adapted)
    assert len(adapt_tokenizer(adapted)) == size
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        adapt_tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer(eos_token: str) -> PreTrainedTokenizerFast:
    """One with the turns of ChatML, which puts a begin token before whatever it is asked to encode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(["a b"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
    plain.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|begin|>", eos_token=eos_token)
    made.chat_template = "{{ bos_token }}" + CHATML
    return made


@pytest.mark.parametrize("eos_token", ["<|end_of_text|>", "<|im_end|>"])
def test_a_chat_template_gives_the_prompt_and_the_end_of_an_answer(eos_token: str) -> None:
    adapted = adapt_tokenizer(chat_tokenizer(eos_token))
    ids = prompt_token_ids(adapted, "Why?", 1)
    turn = "<|im_start|>user\n<ecg><cxr><lab>Why?<|im_end|>\n<|im_start|>assistant\n"
    assert adapted.decode(ids) == f"<|begin|>{turn}" and (ids == 0).sum() == 1
    assert adapted.eos_token == "<|im_end|>" and adapted.pad_token not in (None, adapted.eos_token)


def test_answer_tags_that_a_tokenizer_has_as_special_ones_are_decoded(tmp_path: Path) -> None:
    source = chat_tokenizer("<|im_end|>")
    source.add_special_tokens({"additional_special_tokens": list(ANSWER_TOKENS)})
    adapt_tokenizer(source).save_pretrained(tmp_path)
    found, text = AutoTokenizer.from_pretrained(tmp_path), "<think>a</think><answer>b</answer>"
    ids = found.encode(text, add_special_tokens=False)
    assert len(ids) == 6 and found.decode([*ids, found.eos_token_id], skip_special_tokens=True) == text
    assert found.encode("<ecg>", add_special_tokens=False) == [modality_token_ids(found)["ecg"]]


@pytest.mark.parametrize(
    "dated",
    [
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "Today Date: {{ date_string }}. ",
        "It is {{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}. ",
    ],
)
def test_a_prompt_does_not_depend_on_the_day(dated: str) -> None:
    source = chat_tokenizer("<|im_end|>")
    source.chat_template = dated + CHATML
    adapted = adapt_tokenizer(source)
    text = adapted.decode(prompt_token_ids(adapted, "Why?", 1))
    assert text.startswith(("Today Date: 26 Jul 2024. ", "It is 2024-07-26 00:00:00.000000. "))


def test_placeholders_stay_where_a_question_names_each_once(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_token_ids(tokenizer, "See <lab>, <ecg> and <cxr>.", 2)
    assert tokenizer.decode(ids) == "<bos><user>See <lab><lab>, <ecg><ecg> and <cxr><cxr>.<assistant>"


def test_whatever_ends_an_answer_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    assert stop_token_ids(tokenizer, None) == stop_token_ids(tokenizer, GenerationConfig()) == [end]
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[end, 600, 500])) == sorted({end, 500, 600})
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=600)) == sorted({end, 600})


def test_a_template_that_ends_without_a_special_token_leaves_the_end_token() -> None:
    plain = chat_tokenizer("<|end_of_text|>")
    plain.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert adapt_tokenizer(plain).eos_token == "<|end_of_text|>"


def test_prompts_expand_placeholders_once(
    config: Config, store: StudyStore, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = diagnosis_prompts(config, tokenizer, "test")
    assert [prompt.item_id for prompt in prompts] == store.study_ids("test")
    assert len({prompt.prompt_id for prompt in prompts}) == 8
    per_modality = config.model.perception.tokens_per_modality
    for prompt in prompts:
        for token_id in modality_token_ids(tokenizer).values():
            assert (prompt.token_ids == token_id).sum() == per_modality
        assert prompt.token_ids.dtype == np.int32 and len(prompt.token_ids) < 60
        assert prompt.ground_truth == "; ".join(store.diagnoses(str(prompt.item_id)))
        assert set(prompt.ground_truth.split("; ")) <= set(DISEASES)
    text = tokenizer.decode(prompts[0].token_ids)
    assert text == f"<bos><user><ecg><cxr><lab>{store.qa('test', 'diagnosis')[0].question}<assistant>"


def test_explanations_keep_the_whole_answer(
    config: Config, store: StudyStore, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = qa_prompts(config, tokenizer, "train", "ecg")
    assert [prompt.ground_truth for prompt in prompts] == [example.answer for example in store.qa("train", "ecg")]


def test_a_question_with_a_placeholder_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="4 placeholders in its prompt, expected 3"):
        prompt_token_ids(tokenizer, "Look at <ecg>.", 1)


def test_an_item_has_its_shapes_and_scale(config: Config, store: StudyStore) -> None:
    study_id = complete_id(store)
    study, item = store.study(study_id), StudyItems(config).get(study_id)
    assert study.ecg is not None and study.cxr is not None
    assert {name: (value.shape, value.dtype.name) for name, value in item.items()} == {
        "ecg": ((12, 1000), "float32"),
        "cxr": ((1, 48, 48), "float32"),
        "lab": ((100,), "float32"),
        "present": ((3,), "bool"),
    }
    np.testing.assert_array_equal(item["ecg"], study.ecg)
    np.testing.assert_allclose(item["cxr"][0], (study.cxr / 255 - 0.5) / 0.25, atol=1e-6)
    measured = study.lab_measured
    np.testing.assert_array_equal(item["lab"][:50][measured], study.lab_percentiles[measured])
    np.testing.assert_array_equal(item["lab"][:50][~measured], store.lab_mean_percentiles[~measured])
    np.testing.assert_array_equal(item["lab"][50:], measured)
    coloured = study_item(study, store, 3)["cxr"]
    assert coloured.shape == (3, 48, 48) and (coloured == item["cxr"]).all()
    published = study_item(study, store, 3, "imagenet")["cxr"]
    expected = [(study.cxr / 255 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    np.testing.assert_allclose(published, expected, atol=1e-5)
    assert published.dtype == np.float32


def test_a_missing_modality_is_zero_and_marked(config: Config, store: StudyStore) -> None:
    items = StudyItems(config)
    for split in store.splits:
        for study_id in store.study_ids(split):
            item = items.get(study_id)
            assert item["present"].tolist() == list(store.study(study_id).present)
            assert all(item[m].any() == shown for m, shown in zip(("ecg", "cxr", "lab"), item["present"]))
            assert item["cxr"].shape == (1, 48, 48) and all(np.isfinite(value).all() for value in item.values())


def test_ablations_withhold_what_they_name(config: Config, store: StudyStore) -> None:
    items, study_id = StudyItems(config), complete_id(store)
    whole, part = items.get(study_id), items.get(f"{study_id}|without=ecg+cxr")
    assert part["present"].tolist() == [False, False, True] and whole["present"].all()
    assert not part["ecg"].any() and not part["cxr"].any() and (part["lab"] == whole["lab"]).all()
    assert without(study_id, "ecg", "cxr") == f"{study_id}|without=ecg+cxr" and without(study_id) == study_id
    with pytest.raises(ValueError, match="modality 'mri' is unknown"):
        items.get(f"{study_id}|without=mri")
    with pytest.raises(DataError, match="is not in the store"):
        items.get("nobody")


def test_a_patient_from_plain_files(config: Config, store: StudyStore, cohort_root: Path, tmp_path: Path) -> None:
    study = store.study(complete_id(store))
    (tmp_path / "labs.json").write_text('{"50912": 3.0}')
    patient = read_patient(
        ecg=cohort_root / f"ecg/train/{study.study_id}.hea",
        cxr=cohort_root / f"cxr/train/{study.study_id}.jpg",
        labs=tmp_path / "labs.json",
        film=FilmConfig(size=48),
        table=store.percentile_table,
    )
    assert (
        patient.ecg is not None
        and study.ecg is not None
        and patient.present == (True, True, True)
        and patient.lab_measured.sum() == 1
    )
    np.testing.assert_allclose(patient.ecg, study.ecg, atol=2e-3)
    np.testing.assert_array_equal(patient.cxr, study.cxr)
    assert np.nanmax(patient.lab_percentiles) > 0.7
    alone = read_patient(
        ecg=None, cxr=None, labs=tmp_path / "labs.json", film=FilmConfig(size=48), table=store.percentile_table
    )
    assert alone.present == (False, False, True)
    with pytest.raises(DataError, match="give at least one"):
        read_patient(ecg=None, cxr=None, labs=None, film=FilmConfig(), table=store.percentile_table)
