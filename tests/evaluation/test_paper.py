"""The published rules: by hand, and against scikit-learn over the answers that are not left out."""

import numpy as np
import pytest

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.evaluation.paper import num_dropped, paper_measures
from medtvt_rl.evaluation.records import StudyAnswers, StudyRecord, study_record


def record(truth: tuple[str, ...], greedy: str, number: int = 0) -> StudyRecord:
    return study_record(f"s{number}", f"p{number}", truth, None, StudyAnswers(sampled=(), greedy=greedy))


def values(records: list[StudyRecord]) -> dict[str, float]:
    return {name: float(m.statistic(m.rows.sum(axis=0))) for name, m in paper_measures(records).items()}


def test_the_published_pattern_is_more_lenient_than_the_format():
    loose = record(("Sepsis",), "so <answer> Sepsis ;</answer> I think <answer>Pneumonia</answer>")
    assert values([loose])["f1"] == 1.0 and num_dropped([loose]) == 0
    assert loose.greedy is None, "the default counts it as wrong"


def test_letters_count():
    found = values([record(("Sepsis", "Hypertension"), "<answer>sepsis; Hypertension; Hypertension.</answer>")])
    assert found["precision"] == pytest.approx(1 / 3) and found["recall"] == pytest.approx(1 / 2)
    assert found["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_an_empty_answer_stays_and_earns_nothing():
    found = values([record(("Sepsis",), "<answer> </answer>"), record(("Sepsis",), "<answer>Sepsis</answer>")])
    assert found["precision"] == found["recall"] == found["f1"] == 0.5


def test_an_answer_without_tags_is_left_out_of_every_mean():
    right = record(("Sepsis",), "<answer>Sepsis</answer>")
    lost = record(("Pneumonia",), "Pneumonia")
    assert values([right, lost]) == values([right])
    assert num_dropped([right, lost]) == 1


def test_undefined_where_nothing_is_left():
    assert all(np.isnan(value) for value in values([record(("Sepsis",), "Sepsis")]).values())


def test_agrees_with_scikit_learn_1_9_1():
    generator = np.random.default_rng(5)
    true = generator.random((40, 7)) < 0.4
    true[:, 0] |= ~true.any(axis=1)
    said = np.where(generator.random((40, 7)) < 0.8, true, ~true)
    dropped = generator.random(40) < 0.2
    records = []
    for number in range(40):
        truth, names = ([d for d, yes in zip(DISEASES, row[number]) if yes] for row in (true, said))
        text = "; ".join(names) if dropped[number] else f"<answer>{'; '.join(names)}</answer>"
        records.append(record(tuple(truth), text, number))
    found = values(records)
    expected = {
        "precision": 0.7236559139784946,
        "recall": 0.8822580645161291,
        "f1": 0.776216077828981,
        "auc": 0.812904636920385,
        "f1_micro": 0.7860696517412935,
        "f1_macro": 0.7787218171990071,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert num_dropped(records) == dropped.sum() > 0
