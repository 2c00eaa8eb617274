"""Strict parsing and normalisation."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.rewards.answer import first_answer, normalise, normalised_names, parse_answer, parsed_reward
from medtvt_rl.rewards.synonyms import SYNONYMS


def test_parses_reasoning_and_names():
    parsed = parse_answer(" <think> ECG: fast. </think>\n<answer> Sepsis; ; acute kidney injury ;Sepsis</answer>\n")
    assert parsed is not None
    assert parsed.reasoning == "ECG: fast."
    assert parsed.names == ("Sepsis", "acute kidney injury", "Sepsis")
    assert parsed.normalised == {"sepsis", "acute renal failure"}


def test_an_empty_answer_is_an_answer():
    parsed = parse_answer("<think></think><answer></answer>")
    assert parsed is not None
    assert parsed.names == ()
    assert parsed_reward("<think></think><answer></answer>") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sepsis",
        "<answer>Sepsis</answer>",
        "<think>a</think><answer>Sepsis",
        "<think>a<answer>Sepsis</answer>",
        "<answer>Sepsis</answer><think>a</think>",
        "<THINK>a</THINK><ANSWER>Sepsis</ANSWER>",
        "<think>a</think> so <answer>Sepsis</answer>",
        "<think>a</think><answer>Sepsis</answer> I hope",
        "<think>a</think><answer>Sepsis</answer><answer>Pneumonia</answer>",
        "<think>a</think><think>b</think><answer>Sepsis</answer>",
        "<think>a <answer>x</answer></think><answer>Sepsis</answer>",
    ],
)
def test_rejects_what_breaks_the_format(text):
    assert parse_answer(text) is None
    assert parsed_reward(text) == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("  Acute   Renal\tFailure. ", "acute renal failure"),
        ("Acute-Renal-Failure", "acute renal failure"),
        ("AKI", "acute renal failure"),
        ("Atrial fíbrillation", "atrial fibrillation"),
        ("A-fib", "atrial fibrillation"),
        ("Type 2 diabetes", "diabetes mellitus"),
        ("Gout", "gout"),
        (" .;", ""),
        ("a. fib.", "atrial fibrillation"),
        ("A.F.", "atrial fibrillation"),
        ("AFib", "atrial fibrillation"),
        ("Paroxysmal atrial fibrillation", "atrial fibrillation"),
        ("Atrial flutter", "atrial flutter"),
        ("C.A.D.", "coronary artery disease"),
        ("Coronary Artery Disease (CAD)", "coronary artery disease"),
        ("CAD (coronary artery disease).", "coronary artery disease"),
        ("Ischæmic heart disease", "coronary artery disease"),
        ("Coronary artery diseases", "coronary artery disease"),
        ("Atherosclerotic heart disease of native coronary artery", "coronary artery disease"),
        ("Acute Renal Failures", "acute renal failure"),
        ("Renal failure", "renal failure"),
        ("Acute kidney failure, unspecified", "acute renal failure"),
        ("Essential (primary) hypertension", "hypertension"),
        ("Pneumonias", "pneumonia"),
        ("Pneumonia (ruled out)", "pneumonia ruled out"),
        ("No pneumonia", "no pneumonia"),
        ("T2DM", "diabetes mellitus"),
        ("Type II diabetes-mellitus", "diabetes mellitus"),
        ("Diabetes Mellitus (Type 2)", "diabetes mellitus"),
        ("DM2", "diabetes mellitus"),
        ("Diabetes insipidus", "diabetes insipidus"),
        ("Ｓｅｐｓｉｓ", "sepsis"),
        ("Sep\u200bs\u00adis\ufeff", "sepsis"),
        ("Sepsis\u00a0", "sepsis"),
        ("Septicæmia", "sepsis"),
        ("Асептика", "асептика"),
        ("", ""),
        ("()", ""),
    ],
)
def test_normalise(name, expected):
    assert normalise(name) == expected


def test_nothing_is_named_by_words_for_nothing():
    assert normalised_names(("None", "N/A", "-", "Sepsis")) == {"sepsis"}


def test_a_semicolon_of_another_script_separates_names():
    assert normalised_names(("Sepsis； CAD", "Gout\u037eAKI")) == {
        "sepsis",
        "coronary artery disease",
        "gout",
        "acute renal failure",
    }


@given(st.text())
def test_a_normalised_name_stays_as_it_is(name):
    assert normalise(normalise(name)) == normalise(name)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "a", "Sepsis; "])))
def test_parsing_agrees_with_the_form_written_as_one_pattern(parts):
    text = "".join(parts)
    no_tag = r"(?:(?!</?(?:think|answer)>).)*"
    form = rf"\s*<think>{no_tag}</think>\s*<answer>{no_tag}</answer>\s*"
    assert (parse_answer(text) is not None) == bool(re.fullmatch(form, text, re.DOTALL))


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\n", "a", ""])))
def test_the_first_answer_agrees_with_the_published_pattern(parts):
    text = "".join(parts)
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert first_answer(text) == (found.group(1) if found else None)


def test_tags_without_end_cost_no_more_than_their_length():
    assert parse_answer("<think>" + "</think><answer>" * 100_000) is None


def test_synonyms_lead_to_the_seven_diseases_and_are_normalised_themselves():
    canonical = {normalise(name) for name in DISEASES}
    assert len(canonical) == len(DISEASES)
    assert set(SYNONYMS.values()) <= canonical
    assert all(normalise(name) == target for name, target in SYNONYMS.items())
    assert not canonical & SYNONYMS.keys()
