"""Strict parsing and normalisation."""

import pytest

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.rewards.answer import SYNONYMS, normalise, normalised_names, parse_answer


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
    ],
)
def test_normalise(name, expected):
    assert normalise(name) == expected


def test_nothing_is_named_by_words_for_nothing():
    assert normalised_names(("None", "-", "Sepsis")) == {"sepsis"}


def test_synonyms_lead_to_the_seven_diseases_and_are_normalised_themselves():
    canonical = {normalise(name) for name in DISEASES}
    assert len(canonical) == len(DISEASES)
    assert set(SYNONYMS.values()) <= canonical
    assert all(normalise(name) == target for name, target in SYNONYMS.items())
    assert not canonical & SYNONYMS.keys()
