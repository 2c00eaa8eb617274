"""The evaluator over a small made-up split: honest denominators, findings, pairing."""

import json

import numpy as np
import pytest

from medtvt_rl.config import Config
from medtvt_rl.evaluation.diagnosis import DiagnosisEvaluator, StudyAnswers

TRUTHS = {
    "s0": ("Sepsis", "Pneumonia"),
    "s1": ("Hypertension",),
    "s2": ("Sepsis",),
    "s3": (),
}
FINDINGS = {
    "s0": {"afib": True, "effusion": True, "lactate_high": False},
    "s1": {"afib": False, "effusion": True, "lactate_high": True},
    "s2": None,
    "s3": {"afib": False, "effusion": False, "lactate_high": False},
}


class Store:
    """A study store in memory, one patient a study."""

    def __init__(self, findings=FINDINGS) -> None:
        self._findings = findings

    def study_ids(self, split: str) -> list[str]:
        return list(TRUTHS) if split == "test" else []

    def patient_id(self, study_id: str) -> str:
        return f"patient of {study_id}"

    def diagnoses(self, study_id: str) -> tuple[str, ...]:
        return TRUTHS[study_id]

    def findings(self, study_id: str) -> dict[str, bool] | None:
        return self._findings[study_id] if self._findings else None


def evaluator(store: Store | None = None) -> DiagnosisEvaluator:
    config = Config()
    config.evaluation.bootstrap_resamples = 200
    return DiagnosisEvaluator(config, "test", store or Store())


def text(names: str, reasoning: str = "ECG: none. CXR: none. LAB: none.") -> str:
    return f"<think> {reasoning} </think><answer> {names} </answer>"


ANSWERS = {
    "s0": StudyAnswers(
        sampled=(text("Sepsis; Pneumonia"), text("Sepsis")),
        greedy=text("Sepsis; PNA", "ECG: irregular rhythm without P waves. CXR: pleural effusion. LAB: lactate high."),
    ),
    "s1": StudyAnswers(sampled=(text("Sepsis"), text("HTN")), greedy="Hypertension, I am sure"),
    "s2": StudyAnswers(
        sampled=(text("Sepsis; Gout"), "no"), greedy=text("Sepsis; Gout", "ECG: irregular rhythm without P waves.")
    ),
    "s3": StudyAnswers(sampled=(text(""), text("Sepsis")), greedy=text("Hypertension")),
}


def values(result) -> dict[str, float]:
    return {name: interval.value for name, interval in result.metrics.items()}


def test_metrics_by_hand():
    result = evaluator().evaluate(ANSWERS)
    found = values(result)
    assert result.study_ids == ("s0", "s1", "s2", "s3")
    assert result.per_study["jaccard_greedy"].tolist() == [1.0, 0.0, 0.5, 0.0]
    assert result.per_study["jaccard"].tolist() == [0.75, 0.5, 0.25, 0.5]
    assert found["jaccard"] == pytest.approx(0.5) and found["jaccard_greedy"] == pytest.approx(0.375)
    assert found["exact_match"] == pytest.approx(0.25)
    assert found["parse_rate"] == pytest.approx(0.75) and found["parse_rate_sampled"] == pytest.approx(7 / 8)
    # Sepsis 2 hits, Pneumonia 1 hit, Hypertension 1 false alarm (s3) and 1 miss (s1, broken format)
    assert found["f1_micro"] == pytest.approx(6 / (6 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["f1/Sepsis"] == 1.0 and found["f1/Hypertension"] == 0.0
    assert np.isnan(found["f1/Diabetes Mellitus"])


def test_findings_are_compared_only_where_known():
    found = values(evaluator().evaluate(ANSWERS))
    # ecg: s0 hit; s2 names afib but its findings are unknown. cxr: s0 hit, s1 missed (broken). lab: s0 false, s1 missed
    assert found["findings_f1_ecg"] == 1.0
    assert found["findings_f1_cxr"] == pytest.approx(2 / 3)
    assert found["findings_f1_lab"] == 0.0


def test_paper_mode_drops_what_does_not_parse():
    result = evaluator().evaluate(ANSWERS)
    assert result.paper_dropped == 1, "s1 has no answer tag"
    found = {name: interval.value for name, interval in result.paper.items()}
    # s0 names Sepsis, and PNA, which is no name to the letter: 1/2, 1/2. s2 Sepsis, Gout: 1/2, 1. s3 has nothing: 0, 0.
    assert found["precision"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found["recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    # of 21 pairs 3 are true, 2 of them named; of the other 18 Hypertension was named for s3
    assert found["auc"] == pytest.approx((2 / 3 + 17 / 18) / 2)
    assert found["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1)), "the miss of s1 is gone"
    assert found["f1_macro"] == pytest.approx((1 + 0 + 0) / 3)


def test_ranking_by_the_share_of_samples():
    found = values(evaluator().evaluate(ANSWERS))
    # Sepsis 1, .5, .5, .5 (true: s0, s2): AUC (2 + 1) / 4; Pneumonia .5, 0, 0, 0 and Hypertension 0, .5, 0, 0: AUC 1
    assert found["auc"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert found["average_precision"] == pytest.approx((0.5 * 1 + 0.5 * 0.5 + 1 + 1) / 3)
    # squared errors: s0 Pneumonia .25; s1 Sepsis .25 and Hypertension .25; s2 Sepsis .25; s3 Sepsis .25
    assert found["brier"] == pytest.approx(5 * 0.25 / 7 / 4)
    # of 28 pairs .5 is said of 5: s0 Pneumonia (true), s1 Sepsis, s1 Hypertension (true), s2 Sepsis (true), s3 Sepsis;
    # 1 is said of s0 Sepsis, which is true, and 0 of 22, none of them true
    assert found["calibration_error"] == pytest.approx(abs(5 * 0.5 - 3) / 28)


def test_each_disease_by_hand():
    result = evaluator().evaluate(ANSWERS)
    sepsis, hypertension = result.diseases["Sepsis"], result.diseases["Hypertension"]
    assert (sepsis.positives, sepsis.negatives) == (2, 2)
    found = {name: interval.value for name, interval in sepsis.metrics.items()}
    assert found["precision"] == found["recall"] == found["f1"] == 1.0
    # shares 1, .5, .5, .5 where s0 and s2 are true
    assert found["auc"] == pytest.approx((2 + 0.5 + 0.5) / 4)
    assert found["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert found["brier"] == pytest.approx(3 * 0.25 / 4)
    wrong = {name: interval.value for name, interval in hypertension.metrics.items()}
    assert wrong["precision"] == wrong["recall"] == wrong["f1"] == 0.0 and wrong["auc"] == 1.0
    assert result.metrics["f1/Sepsis"] == sepsis.metrics["f1"], "one number, shown in two places"


def test_a_disease_that_nobody_has_is_undefined_and_says_how_many_had_it():
    result = evaluator().evaluate(ANSWERS)
    nobody = result.diseases["Diabetes Mellitus"].to_dict()
    assert (nobody["positives"], nobody["negatives"]) == (0, 4)
    for name in ("auc", "average_precision", "f1", "precision", "recall"):
        assert nobody[name] == {"value": None, "low": None, "high": None}, name
    assert nobody["brier"]["value"] == 0.0
    everybody = evaluator().evaluate({"s2": ANSWERS["s2"]}).diseases["Sepsis"].to_dict()
    assert (everybody["positives"], everybody["negatives"]) == (1, 0)
    assert everybody["auc"]["value"] is None and everybody["f1"]["value"] == 1.0
    assert result.to_dict()["diseases_in_mean"] == {"f1": 3, "auc": 3, "average_precision": 3}


def test_no_answer_that_parses_at_all():
    broken = {i: StudyAnswers(sampled=("no", "no"), greedy="no") for i in TRUTHS}
    result = evaluator().evaluate(broken)
    found = values(result)
    assert found["f1_micro"] == found["parse_rate"] == found["jaccard"] == 0.0
    assert found["auc"] == 0.5, "every study is named with the same share, 0"
    assert result.paper_dropped == 4
    assert all(np.isnan(interval.value) for interval in result.paper.values())
    json.dumps(result.to_dict(), allow_nan=False)


def test_reliability_by_hand():
    bins = evaluator().evaluate(ANSWERS).reliability
    assert [(b.said, b.pairs, b.observed.value) for b in bins] == [(0.0, 22, 0.0), (0.5, 5, 0.6), (1.0, 1, 1.0)]
    assert bins[1].observed.low < 0.6 < bins[1].observed.high


def test_greedy_only_leaves_out_what_needs_samples():
    greedy = {study_id: StudyAnswers(sampled=(), greedy=answer.greedy) for study_id, answer in ANSWERS.items()}
    found = values(evaluator().evaluate(greedy))
    assert (
        not {"jaccard", "parse_rate_sampled", "auc", "average_precision", "brier", "calibration_error"} & found.keys()
    )
    assert found["jaccard_greedy"] == pytest.approx(0.375)
    result = evaluator().evaluate(greedy)
    assert result.reliability == [] and set(result.diseases["Sepsis"].metrics) == {"precision", "recall", "f1"}


def test_data_without_findings_has_no_findings_metrics():
    found = values(evaluator(Store(findings=None)).evaluate(ANSWERS))
    assert not [name for name in found if name.startswith("findings")]


def test_paired_gain():
    subject = evaluator()
    before = subject.evaluate(ANSWERS)
    right = {i: StudyAnswers(sampled=(text("; ".join(TRUTHS[i])),), greedy=text("; ".join(TRUTHS[i]))) for i in TRUTHS}
    after = subject.evaluate(right)
    gain = subject.paired_gain(before, after)
    assert gain.value == pytest.approx(0.5)
    assert 0.25 <= gain.low <= gain.high <= 0.75
    assert subject.paired_gain(before, after, metric="f1_micro").value == pytest.approx(0.25)
    assert subject.paired_gain(before, before, metric="auc").to_dict() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_paired_gain_needs_the_same_studies_and_the_metric():
    subject = evaluator()
    full, part = subject.evaluate(ANSWERS), subject.evaluate({"s1": ANSWERS["s1"]})
    with pytest.raises(ValueError, match="4 studies before, 1 after"):
        subject.paired_gain(full, part)
    with pytest.raises(ValueError, match="'bleu' before"):
        subject.paired_gain(full, full, metric="bleu")


def test_answers_are_checked():
    with pytest.raises(ValueError, match="none"):
        evaluator().evaluate({})
    with pytest.raises(ValueError, match=r"1 studies are not in split 'test', e\.g\. study-[0-9a-f]{12}"):
        evaluator().evaluate({"s9": ANSWERS["s0"]})


def test_result_is_json_ready():
    written = json.loads(json.dumps(evaluator().evaluate(ANSWERS).to_dict(), allow_nan=False))
    assert written["num_studies"] == written["num_patients"] == 4
    assert written["per_disease"]["Diabetes Mellitus"]["value"] is None
    assert written["metrics"]["jaccard"]["low"] <= 0.5 <= written["metrics"]["jaccard"]["high"]
