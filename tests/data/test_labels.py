"""Phrases and the way back from a text."""

import pytest

from medtvt_rl.data.labels import ALL_FINDINGS, FINDINGS, PHRASES, SECTIONS, answer_text, named_findings


def test_every_phrase_names_its_finding_alone() -> None:
    for modality, keys in FINDINGS.items():
        for key in keys:
            for phrase in PHRASES[key]:
                assert named_findings(f"{SECTIONS[modality]}: {phrase}.") == {key}, phrase


def test_a_phrase_counts_only_in_its_own_section() -> None:
    assert (
        named_findings("ECG: pleural effusion. CXR: creatinine high, ST segment depression. LAB: perihilar edema.")
        == set()
    )


def test_sections_may_lack_or_change_order() -> None:
    text = "LAB: INR high. ECG: not available. CXR: clear lungs and pleural effusion."
    assert named_findings(text) == {"inr_high", "effusion"}


@pytest.mark.parametrize("clause", ["no pleural effusion", "without pleural effusion", "No perihilar haze"])
def test_a_negated_clause_names_nothing(clause: str) -> None:
    assert named_findings(f"CXR: normal heart size, {clause}.") == set()


def test_what_follows_the_reasoning_does_not_count() -> None:
    assert named_findings("<think> LAB: AST high. </think><answer> LAB: INR high </answer>") == {"ast_high"}


def test_words_around_a_phrase_do_not_make_another() -> None:
    assert named_findings("LAB: FAST highway. ECG: asinus rhythm.") == set()


def test_every_finding_has_phrases() -> None:
    assert set(PHRASES) == set(ALL_FINDINGS)


def test_answer_text_follows_the_order_of_diseases() -> None:
    assert answer_text(["Sepsis", "Hypertension"]) == "Hypertension; Sepsis"
    with pytest.raises(ValueError, match="Flu"):
        answer_text(["Flu"])
