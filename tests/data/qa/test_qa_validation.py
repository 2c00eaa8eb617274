"""What answers say, and which are refused: form, diagnoses, findings, numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_qa_labels import labels_of

from medtvt_rl.data.labels import ALL_FINDINGS, PHRASES, named_findings
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.qa.build import answer_by_templates, make_items
from medtvt_rl.data.qa.concepts import mentions
from medtvt_rl.data.qa.labels import StudyLabels
from medtvt_rl.data.qa.reference_ranges import RANGES, LabReading
from medtvt_rl.data.qa.templates import Item, chat_messages, make_item, template_answer
from medtvt_rl.data.qa.validation import refusal
from medtvt_rl.data.study_store import StudyStore


def reading(item: str, value: float, level: str) -> LabReading:
    return LabReading(item=item, value=value, range=RANGES[item], level=level)


STUDY = StudyLabels(
    study_id="77001",
    patient_id="88001",
    split="train",
    ecg_path="ecg/77001",
    cxr_path="cxr/77001.jpg",
    statements=("Sinus tachycardia", "Possible left ventricular hypertrophy", "Abnormal ECG"),
    film={"Pleural Effusion": "present", "Edema": "uncertain", "Pneumothorax": "absent"},
    labs=(reading("50912", 2.4, "high"), reading("50971", 4.0, "normal"), reading("51222", 8.1, "low")),
    diseases=("Acute Renal Failure", "Sepsis"),
)
NO_FILM = dataclasses.replace(STUDY, study_id="77002", cxr_path="", film={}, gaps={"cxr": "no film taken"})
ECG = "ECG: sinus tachycardia, possibly left ventricular hypertrophy."
CXR = "CXR: a pleural effusion, edema is possible, no pneumothorax."
LAB = "LAB: creatinine is high at 2.4 mg/dL, which supports Acute Renal Failure, hemoglobin low, potassium normal."
ANSWER = "<answer> Acute Renal Failure; Sepsis </answer>"


def chain(ecg: str = ECG, cxr: str = CXR, lab: str = LAB, answer: str = ANSWER) -> str:
    return f"<think> {ecg} {cxr} {lab} </think>{answer}"


@pytest.mark.parametrize(
    ("text", "asserted", "possible", "denied"),
    [
        ("Sinus tachycardia", "tachycardia", "", ""),
        ("Cannot rule out anterior infarct", "", "q waves or infarct", ""),
        ("ST-T changes may be due to ischemia", "st or t changes", "ischemia", ""),
        ("No effusion, pneumothorax, or consolidation", "", "", "pleural effusion|pneumothorax|consolidation"),
        ("No effusion, but atelectasis", "atelectasis", "", "pleural effusion"),
        ("A pneumothorax is not seen", "", "", "pneumothorax"),
        ("Pulmonary hypertension", "", "", ""),
        ("HTN, T2 lesion, af ter", "hypertension", "", ""),
        ("irregularly irregular rhythm with absent P waves", "atrial fibrillation", "", ""),
        ("sodium, potassium and chloride are normal", "50983 normal|50971 normal|50902 normal", "", ""),
        ("elevated urea nitrogen, creatinine", "51006 high|50912 high", "", ""),
        ("creatinine, at 2.4, is above its range", "50912 high", "", ""),
        ("potassium is not elevated", "", "", "50971 high"),
        ("RDW-SD high, RDW low, PTT high, PT low", "52172 high|51277 low|51275 high|51274 low", "", ""),
        ("Bilirubin, Total 2.3 mg/dL high", "50885 high", "", ""),
        ("anemia and hyperkalemia", "51222 low|50971 high", "", ""),
    ],
)
def test_clauses_are_read_with_their_negations_and_doubts(text: str, asserted: str, possible: str, denied: str) -> None:
    found = mentions(text)
    expected = [set(filter(None, names.split("|"))) for names in (asserted, possible, denied)]
    assert [found.asserted, found.possible, found.denied] == expected


def test_every_phrase_of_the_model_s_vocabulary_is_read_as_one_concept() -> None:
    for key in ALL_FINDINGS:
        concepts = [mentions(f"{phrase}.") for phrase in PHRASES[key]]
        assert all(len(found.asserted) == 1 and not found.possible | found.denied for found in concepts), key
        assert len({frozenset(found.asserted) for found in concepts}) == 1, key


@pytest.mark.parametrize("kind", QA_KINDS)
def test_templates_pass_their_own_check_and_name_the_cohort_s_findings(
    kind: str, cohort_root: Path, store: StudyStore
) -> None:
    items = make_items(labels_of(cohort_root).studies, [kind], seed=3)  # type: ignore[list-item]
    answers = answer_by_templates(items)
    assert answers.rejected == [] and len(answers.accepted) == len(items) > 25
    for place, item in enumerate(items):
        findings = store.findings(item.labels.study_id) or {}
        said = named_findings(answers.accepted[place])
        for key in said:  # laboratory deviations are counted from the reference range, the cohort's from a higher one
            assert findings[key] or key.endswith(("_high", "_low")), key
        if kind != "lab":
            wanted = {key for key in ALL_FINDINGS if findings[key] and not key.endswith(("_high", "_low"))}
            modality = {"ecg": ALL_FINDINGS[:6], "cxr": ALL_FINDINGS[6:10], "diagnosis": ALL_FINDINGS[:10]}[kind]
            assert wanted & set(modality) == said & set(modality)


def test_a_good_answer_of_each_kind_is_taken() -> None:
    assert refusal(make_item(STUDY, "diagnosis", 0), chain()) is None
    assert refusal(make_item(NO_FILM, "diagnosis", 0), chain(cxr="CXR: not available.")) is None
    for kind, text in (("ecg", ECG), ("cxr", CXR), ("lab", "Creatinine is 2.4 (0.4-1.2), i.e. elevated. Anemia.")):
        assert refusal(make_item(STUDY, kind, 0), text) is None  # type: ignore[arg-type]
    assert refusal(make_item(STUDY, "ecg", 0), "This 12-lead ECG shows sinus tachycardia.") is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "the answer is empty"),
        ("x" * 7000, "7000 characters"),
        ("Acute Renal Failure; Sepsis", "the form is not"),
        (chain() + " I hope this helps.", "the form is not"),
        (chain().replace("ECG:", "<ecg> ECG:"), "holds a tag"),
        (
            chain(answer="<answer> Sepsis </answer>"),
            "Sepsis, the labels say Acute Renal Failure; Sepsis",
        ),
        (chain(answer="<answer> Sepsis; Gout </answer>"), "'Gout' is unknown"),
        (chain(ecg="Well. " + ECG), "does not begin with ECG"),
        (chain(cxr=""), "the headings are ECG, LAB, expected ECG, CXR, LAB"),
        (chain(ecg="ECG: atrial fibrillation, tachycardia."), "under ECG: atrial fibrillation is named"),
        (chain(ecg="ECG: tachycardia, which may reflect pneumonia."), "under ECG: pneumonia is named"),
        (chain(ecg="ECG: tachycardia, pleural effusion."), "under ECG: pleural effusion is named"),
        (
            chain(ecg="ECG: tachycardia, left ventricular hypertrophy."),
            "is asserted, the labels hold it only",
        ),
        (chain(ecg="ECG: unremarkable."), "all is called normal, the labels have tachycardia"),
        (chain(ecg="ECG: a regular tracing."), "no finding of the labels is named, such as tachycardia"),
        (chain(ecg="ECG: tachycardia at 131 a minute."), "the number 131 is not among the labels"),
        (chain(cxr="CXR: no effusion."), "under CXR: pleural effusion is denied"),
        (chain(lab="LAB: creatinine high, potassium high."), "under LAB: Potassium high is named"),
        (chain(lab="LAB: creatinine high, lactate high."), "under LAB: Lactate high is named"),
        (chain(lab="LAB: creatinine normal."), "Creatinine normal is named"),
        (chain(lab="LAB: creatinine high at 2.5."), "the number 2.5 is not among the labels"),
    ],
)
def test_what_the_labels_do_not_say_is_refused(answer: str, reason: str) -> None:
    assert reason in str(refusal(make_item(STUDY, "diagnosis", 0), answer))


def test_more_refusals() -> None:
    film = make_item(NO_FILM, "diagnosis", 0)
    assert "CXR was not taken, and more is said" in str(refusal(film, chain()))
    assert "tag" in str(refusal(make_item(STUDY, "ecg", 0), "<think>tachycardia</think>"))
    assert "sepsis is named" in str(refusal(make_item(STUDY, "ecg", 0), "Tachycardia of sepsis."))
    assert "is named" in str(refusal(make_item(STUDY, "cxr", 0), "An effusion with cardiomegaly."))


def test_a_prompt_holds_the_labels_and_no_id() -> None:
    for kind in QA_KINDS:
        text = " ".join(message["content"] for message in chat_messages(make_item(STUDY, kind, 0)))
        assert not any(secret in text for secret in ("77001", "77002", "88001", ".jpg", "train"))
        assert ("Diagnoses: Acute Renal Failure; Sepsis" in text) == (kind == "diagnosis")
        assert ("Creatinine 2.4 mg/dL (reference 0.4 to 1.2): high" in text) == (kind in ("lab", "diagnosis"))
    assert "CXR: not available" in chat_messages(make_item(NO_FILM, "diagnosis", 0))[1]["content"]


def test_an_item_is_the_same_whatever_the_others_are() -> None:
    items: list[Item] = [make_item(STUDY, "ecg", 5), make_item(dataclasses.replace(STUDY, film={}), "ecg", 5)]
    assert items[0].question == items[1].question and template_answer(items[0]) == template_answer(items[1])
    other = [make_item(dataclasses.replace(STUDY, study_id=str(i)), "ecg", 5).question for i in range(20)]
    assert len(set(other)) == 2
