"""The evidence reward by hand: what is named against what is there, and what cannot be judged."""

import pytest

from medtvt_rl.data.labels import ALL_FINDINGS
from medtvt_rl.rewards.answer import parse_answer
from medtvt_rl.rewards.evidence import asserted_findings, evidence_reward, labelled_findings


def evidence(*there: str) -> dict:
    return {"study_id": "s7", "findings": {key: key in there for key in ALL_FINDINGS}}


def completion(reasoning: str) -> str:
    return f"<think> {reasoning} </think><answer> Sepsis </answer>"


THREE = "ECG: rate above 100. CXR: pleural effusion. LAB: lactate high."
NOTHING = "ECG: regular sinus rhythm. CXR: clear lungs. LAB: no marked change."


@pytest.mark.parametrize(
    ("reasoning", "there", "expected"),
    [
        (THREE, ("tachycardia", "effusion", "lactate_high"), 1.0),
        # Two of three named are there, and nothing is missed: 2 * 2 / (2 * 2 + 1).
        (THREE, ("tachycardia", "effusion"), 4 / 5),
        # Three named are there, one is missed: 2 * 3 / (2 * 3 + 1).
        (THREE, ("tachycardia", "effusion", "lactate_high", "edema"), 6 / 7),
        # One hit, two false alarms, one miss: 2 / (2 + 2 + 1).
        (THREE, ("effusion", "edema"), 2 / 5),
        (THREE, (), 0.0),
        (NOTHING, ("effusion",), 0.0),
        (NOTHING, (), 1.0),
        ("", (), 1.0),
        # A finding named in another modality's section is not named at all.
        ("ECG: pleural effusion. CXR: clear lungs.", ("effusion",), 0.0),
        # A modality that was not taken shows nothing; what is named in it is invented.
        ("ECG: rate above 100. CXR: not available.", ("tachycardia",), 1.0),
        ("ECG: rate above 100. CXR: perihilar haze.", ("tachycardia",), 2 / 3),
    ],
)
def test_f1_by_hand(reasoning, there, expected):
    assert evidence_reward(completion(reasoning), "", evidence=evidence(*there)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("text", [THREE, f"<think> {THREE} </think>", completion(THREE) + " And so on.", ""])
def test_a_broken_format_earns_nothing(text):
    assert evidence_reward(text, "", evidence=evidence("tachycardia", "effusion", "lactate_high")) == 0.0
    assert evidence_reward(text, "", evidence=evidence()) == 0.0


def test_a_study_whose_findings_are_unknown_is_named():
    with pytest.raises(ValueError, match=r"study-[0-9a-f]{12}: its findings are unknown.*data\.findings_csv"):
        evidence_reward(completion(THREE), "", evidence={"study_id": "s7", "findings": None})


@pytest.mark.parametrize("given", [None, {}, {"study_id": "s7"}])
def test_a_prompt_without_findings_cannot_be_judged(given):
    with pytest.raises(ValueError, match="the prompt carries no findings"):
        evidence_reward(completion(THREE), "", evidence=given)


def test_what_evaluation_shares():
    assert asserted_findings(parse_answer(completion(THREE))) == {"tachycardia", "effusion", "lactate_high"}
    assert asserted_findings(None) == labelled_findings(None) == frozenset()
    assert labelled_findings({"effusion": True, "edema": False}) == {"effusion"}
