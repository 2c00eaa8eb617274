"""What the report shows of an evaluation: published numbers, diseases, calibration."""

import io
from typing import Any

import pytest

from medtvt_rl.evaluation.charts import reliability_chart
from medtvt_rl.evaluation.report import print_table, render_report


def interval(value: float | None, half: float = 0.02) -> dict[str, float | None]:
    return {"value": value, "low": None if value is None else value - half, "high": value and value + half}


@pytest.fixture
def summary() -> dict[str, Any]:
    policy = {
        "jaccard": interval(0.5),
        "per_disease": {"Sepsis": interval(0.7)},
        "by_disease": {
            "Sepsis": {"positives": 40, "negatives": 60, "f1": interval(0.7), "auc": interval(0.81)},
            "Pneumonia": {"positives": 0, "negatives": 100, "f1": interval(0.0), "auc": interval(None)},
        },
        "reliability": [
            {"said": 0.25, "observed": interval(0.125), "pairs": 300},
            {"said": 1.0, "observed": interval(0.875), "pairs": 400},
        ],
        "paper": {"f1": interval(0.61), "auc": interval(0.71), "answers_dropped": 3, "bleu": interval(0.31)},
    }
    return {
        "evaluation": {
            "sft": policy,
            "grpo": policy,
            "metrics": "paper",
            "notes": {"meteor": "WordNet <is> not installed"},
        }
    }


def test_published_numbers_come_first_where_they_were_asked_for(summary: dict[str, Any]) -> None:
    page = render_report(summary=summary)
    assert "<details open><summary>As the published evaluation" in page
    assert page.index("As the published evaluation") < page.index("Jaccard, sampled answers")
    assert "METEOR: WordNet &lt;is&gt; not installed" in page
    assert "Left out here: 3 after SFT, 3 after GRPO." in page
    shown = io.StringIO()
    print_table(summary, shown)
    lines = shown.getvalue().splitlines()
    assert lines[1].startswith("as published: F1, mean over answers") and "0.610 [0.590, 0.630]" in lines[1]
    assert any(line.split() == ["as", "published:", "answers", "left", "out", "3", "3"] for line in lines)
    assert "not computed: METEOR: WordNet <is> not installed" in lines


def test_they_are_folded_by_default(summary: dict[str, Any]) -> None:
    summary["evaluation"]["metrics"] = "honest"
    page = render_report(summary=summary)
    assert "<details><summary>As the published evaluation" in page
    assert page.index("As the published evaluation") > page.index("Jaccard, sampled answers")
    shown = io.StringIO()
    print_table(summary, shown)
    assert "as published" not in shown.getvalue()


def test_a_disease_that_nobody_has_is_a_dash_with_its_count(summary: dict[str, Any]) -> None:
    page = render_report(summary=summary)
    row = page[page.index("<td>Pneumonia *</td>") :].split("</tr>")[0]
    assert "<td>0 / 100</td>" in row and ">-</td>" in row and "nan" not in row.lower()
    assert "<td>40 / 60</td>" in page and "Fewer than 10 patients" in page


def test_the_reliability_chart_has_a_point_for_each_bin_and_policy(summary: dict[str, Any]) -> None:
    page = render_report(summary=summary)
    assert page.count("after GRPO: said ") == page.count("after SFT: said ") == 2
    assert "said 0.25, observed 0.125 [0.105, 0.145]" in page
    summary["evaluation"]["sft"].pop("reliability")
    assert "No shares of sampled answers were found." in render_report(summary=summary)


def test_points_lie_where_their_numbers_say() -> None:
    chart = reliability_chart("t", [("a", [(0.0, (0.0, 0.0, 0.0)), (1.0, (1.0, 1.0, 1.0))])])
    first, last = (one.split('"')[0] for one in chart.split('cy="')[1:])
    assert float(first) > float(last), "up is more"
    diagonal = chart.split('<path class="grid line" d="')[1].split('"')[0]
    assert first in diagonal and last in diagonal
    assert reliability_chart("t", [("a", [])]) == ""
