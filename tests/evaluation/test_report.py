"""report.html and the closing table: what is shown, what is escaped, and what a missing part costs."""

import io
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtvt_rl.evaluation.charts import IntervalRow, Series, interval_chart, line_chart, moving_average, thinned, ticks
from medtvt_rl.evaluation.report import print_table, render_report, write_report
from medtvt_rl.evaluation.summary import curves, estimate, per_disease, policy_metrics

VOID = {"meta", "br", "hr", "img", "link"}


def interval(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def policy(jaccard: float) -> dict[str, Any]:
    return {
        "num_studies": 300,
        "metrics": {
            "jaccard": interval(jaccard),
            "jaccard_greedy": interval(0.62),
            "f1_macro": interval(0.7),
            "brier": interval(0.2 - jaccard / 10),
            "parse_rate": interval(0.998, 0.001),
            "findings_f1_ecg": {"value": None, "low": None, "high": None},
            "f1/Sepsis": interval(0.71, 0.05),
            "f1/Hypertension": interval(0.52, 0.05),
        },
        "paper": {"f1_micro": interval(0.75)},
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "run": "quickstart",
        "stages": {"sft": {"seconds": 61.4, "peak_rss_bytes": 2 * 2**30}, "grpo": {"seconds": 230.0}},
        "peak_rss_bytes": 3 * 2**30,
        "evaluation": {
            "sft": policy(0.47),
            "grpo": policy(0.555),
            "gain": interval(0.085),
            "ablations": {"ecg": interval(-0.17), "cxr": interval(-0.05), "lab": interval(-0.1)},
        },
        "grpo": {"steps": 100, "completions": 12800, "max_staleness_seen": 1, "logprob_max_abs_diff": 1e-5},
    }


METRICS = [
    {"stage": "sft", "step": step, "time": 0.0, "loss": 2.0 / (step + 1), "validation_score": 0.1 * step}
    for step in range(5)
] + [
    {"stage": "grpo", "step": step, "time": 0.0, "reward/total": 0.5 + step / 200, "kl": 0.001 * step, "novel": 1.0}
    for step in range(40)
]
SAMPLES = [
    {
        "step": 10 * number,
        "prompt_id": f"p{number}",
        "ground_truth": "Sepsis",
        "completions": [
            {"text": f"<think> ECG: a{i}. </think><answer> Sepsis </answer>", "reward": i / 8} for i in range(8)
        ],
    }
    for number in range(12)
]


class Balanced(HTMLParser):
    """Collects the text of a page and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Balanced:
    page = Balanced()
    page.feed(html)
    assert page.open == []
    return page


def test_a_whole_report(summary: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, summary=summary, metrics=METRICS, samples=SAMPLES, config_yaml="cohort:\n  num_train: 1500\n")
    html = path.read_text()
    page = parsed(html)
    for words in (
        "0.470 → 0.555",
        "paired gain +0.085 [0.065, 0.105]",
        "Hypertension",
        "without the film",
        "-0.050",
        "Reward by component",
        "KL to the reference policy",
        "1 more curves",
        "SFT: Validation score",
        "12,800",
        "61 s, 2.0 GiB",
        "291 s together; at most 3.0 GiB",
        "step 110, p11",
        "reward 0.88",
        "mean nothing clinically",
        "num_train: 1500",
        "As the published evaluation computes them",
    ):
        assert words in page.text, words
    assert "svg" in page.tags and "script" not in page.tags and "link" not in page.tags
    assert "src=" not in html and "http" not in html  # needs nothing else
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_of_nothing_names_what_is_missing() -> None:
    page = parsed(render_report(summary={}))
    for words in (
        "No evaluation was found",
        "No curves of GRPO",
        "No stage has left its time",
        "No samples",
        "No configuration",
    ):
        assert words in page.text
    assert "mean nothing clinically" in page.text


@pytest.mark.parametrize("lost", ["stages", "evaluation", "grpo", "peak_rss_bytes", "run"])
def test_each_part_may_be_missing(summary: dict[str, Any], lost: str) -> None:
    summary.pop(lost)
    parsed(render_report(summary=summary, metrics=METRICS))


@pytest.mark.parametrize("lost", ["sft", "grpo", "gain", "ablations"])
def test_each_part_of_the_evaluation_may_be_missing(summary: dict[str, Any], lost: str) -> None:
    summary["evaluation"].pop(lost)
    page = parsed(render_report(summary=summary))
    assert "Jaccard, sampled" in page.text
    print_table(summary, io.StringIO())


def test_everything_is_escaped(summary: dict[str, Any]) -> None:
    evil = "<script>alert('x')</script>"
    summary["run"] = evil
    summary["stages"][evil] = {"seconds": 1.0}
    summary["evaluation"]["grpo"]["metrics"][f"f1/{evil}"] = interval(0.5)
    summary["evaluation"]["ablations"][evil] = interval(-0.1)
    samples = [{"step": evil, "prompt_id": evil, "ground_truth": evil, "completions": [{"text": evil, "reward": evil}]}]
    rows = [{"stage": "grpo", "step": 1, evil: 1.0}, {"stage": "grpo", "step": 2, evil: 2.0}]
    html = render_report(summary=summary, metrics=rows, samples=samples, config_yaml=evil)
    assert "<script" not in html and html.count("&lt;script&gt;") >= 8
    parsed(html)


def test_real_data_gets_another_warning() -> None:
    assert "mean nothing clinically" not in render_report(summary={}, config_yaml="run:\n  name: x\ncohort: null\n")
    assert "mean nothing clinically" in render_report(summary={}, config_yaml="cohort:\n  seed: 0\ndata: {}\n")


def test_malformed_input_is_tolerated() -> None:
    summary = {
        "evaluation": {"sft": 3, "grpo": {"metrics": {"jaccard": "high"}}, "gain": None},
        "stages": [],
        "grpo": None,
    }
    samples = [{}, {"completions": "none"}, {"completions": [1, {"text": None}]}]
    parsed(render_report(summary=summary, metrics=[{}, {"stage": "grpo"}, {"stage": 1, "step": 2}], samples=samples))


def test_the_table_on_a_terminal_and_in_a_log(summary: dict[str, Any]) -> None:
    plain = io.StringIO()
    print_table(summary, plain)
    lines = plain.getvalue().splitlines()
    assert lines[1].split() == [
        "Jaccard,",
        "sampled",
        "answers",
        "0.470",
        "[0.450,",
        "0.490]",
        "0.555",
        "[0.535,",
        "0.575]",
    ]
    assert lines[-1].endswith("+0.085 [0.065, 0.105]")
    sepsis = next(line for line in lines if line.startswith("F1, Sepsis"))
    assert sepsis.split()[2:] == ["0.710", "[0.660,", "0.760]"] * 2
    assert not any("clinically" in line for line in lines), "nothing says that this cohort was simulated"
    simulated = io.StringIO()
    print_table({**summary, "simulated": True}, simulated)
    assert "simulated cohort: they mean nothing clinically" in simulated.getvalue().splitlines()[-1]
    assert "\x1b" not in plain.getvalue() and all(line.isascii() for line in lines)
    nothing = io.StringIO()
    print_table({}, nothing)
    assert "no evaluation" in nothing.getvalue()


def test_both_shapes_of_the_evaluation_are_read() -> None:
    flat = {"evaluation": {"sft": {"jaccard": interval(0.4), "per_disease": {"Sepsis": interval(0.7)}}}}
    nested = {"evaluation": {"sft": {"metrics": {"jaccard": interval(0.4), "f1/Sepsis": interval(0.7)}}}}
    assert policy_metrics(flat, "sft") == policy_metrics(nested, "sft")
    assert per_disease(flat, "sft") == per_disease(nested, "sft") == {"Sepsis": estimate(interval(0.7))}


def test_a_resumed_run_s_last_row_of_a_step_counts() -> None:
    rows = [
        {"stage": "grpo", "step": 2, "kl": 9.0},
        {"stage": "grpo", "step": 1, "kl": 1.0},
        {"stage": "grpo", "step": 2, "kl": None},
    ]
    assert curves(rows) == {"grpo": {"kl": [(1.0, 1.0), (2.0, None)]}}


def test_a_task_without_diagnoses_shows_its_reward() -> None:
    values = {"reward": interval(0.5), "reward_greedy": interval(0.6)}
    found = {"evaluation": {"sft": values, "grpo": values, "gain": interval(0.1)}}
    shown = io.StringIO()
    print_table(found, shown)
    assert (
        "Reward, sampled answers" in shown.getvalue() and "in sampled reward, paired over prompts" in shown.getvalue()
    )
    assert "Paired gain of GRPO, sampled reward" in parsed(render_report(summary=found)).text


def test_a_task_of_one_s_own_shows_its_own_metrics_and_no_medicine(summary: dict[str, Any]) -> None:
    values = {"share_right": interval(0.5), "exact_match": interval(0.4), "num_prompts": 40}
    found = {
        "run": "sums",
        "medical": False,
        "simulated": False,
        "stages": {"grpo": {"seconds": 1.0}},
        "evaluation": {"sft": values, "grpo": values, "gain": interval(0.1), "ablations": {"hint": interval(-0.1)}},
    }
    shown = io.StringIO()
    print_table(found, shown)
    text = shown.getvalue() + parsed(render_report(summary=found, samples=SAMPLES, config_yaml="cohort: null")).text
    for words in (
        "share_right",
        "exact_match",
        "before GRPO",
        "gain of GRPO in the main metric, paired over prompts",
        "without hint",
    ):
        assert words in text, words
    for words in ("Means on 40 held-out prompts", "intervals over prompts", "Ground truth:"):
        assert words in text, words
    for word in ("patient", "clinical", "disease", "modality", "Jaccard", "after SFT", "diagnoses"):
        assert word not in text, word


def test_the_names_that_the_stages_give_their_curves_have_charts() -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "sft", "step": step, "epoch/total": 0.5, "epoch/reward/jaccard": 0.4, "epoch/train_loss": 1.0}
        for step in range(3)
    ] + [{"stage": "grpo", "step": step, "sync_gap_max": 1e-6} for step in range(3)]
    text = parsed(render_report(summary={}, metrics=rows)).text
    for title in ("SFT: Validation score", "SFT: Loss", "Log-probs, engine against learner"):
        assert title in text
    assert "more curves" not in text


def test_a_gap_breaks_the_line() -> None:
    html = line_chart("t", [Series(name="a", points=[(0, 1.0), (1, 2.0), (2, None), (3, 1.0)])])
    path = html.split(' d="')[1].split('"')[0]
    assert path.count("M") == 2 and path.count("L") == 1
    assert line_chart("t", [Series(name="a", points=[(0, None)])]) == ""


def test_an_interval_chart_shows_zero_and_skips_what_is_missing() -> None:
    rows = [IntervalRow(label="a", values=[(0.5, 0.4, 0.6), None])]
    svg = interval_chart("t", ["x", "y"], rows, zero=True).split("</div>")[1].removesuffix("</figure>")
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//circle")) == 1
    assert [line.get("class") for line in root.findall(".//line")].count("grid zero") == 1


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_cover_the_range_with_few_numbers(low: float, width: float) -> None:
    found = ticks(low, low + width)
    tolerance = 1e-6 * max(1.0, abs(low), abs(low + width))
    assert found[0] <= low + tolerance and found[-1] >= low + width - tolerance
    assert 2 <= len(found) <= 9 and found == sorted(set(found))


def test_thinning_keeps_the_mean_and_the_gaps() -> None:
    points = [(float(i), None if i < 4 else float(i)) for i in range(1000)]
    thin = thinned(points, 250)
    assert len(thin) == 250 and thin[0] == (1.5, None) and thin[1] == (5.5, 5.5)
    assert thinned(points[:10]) == points[:10]
    flat = moving_average([(float(i), 2.0) for i in range(50)])
    assert flat is not None and {y for _, y in flat} == {2.0}
    assert moving_average([(0.0, 1.0)] * 23) is None


def test_alarms_that_sounded_are_told() -> None:
    page = render_report(summary={"grpo": {"steps": 3, "alarms": ["step 2: entropy <collapses>"]}})
    assert "Alarms that sounded" in page and "entropy &lt;collapses&gt;" in page
    assert "Alarms" not in render_report(summary={"grpo": {"steps": 3, "alarms": []}})


def test_what_each_generator_did_is_told_where_there_are_several() -> None:
    one = {
        "index": 0,
        "node": "L4, spot at 10.0.0.4",
        "groups": 30,
        "tokens": 9000,
        "share": 0.25,
        "tokens_per_s": 120.4,
    }
    other = {**one, "index": 1, "node": "<H100>", "share": 0.75, "tokens_per_s": None}
    html = render_report(summary={"grpo": {"generators": [one, other]}})
    parsed(html)
    assert "L4, spot at 10.0.0.4" in html and "25.0%" in html and "<td>120</td>" in html and "&lt;H100&gt;" in html
    assert "tokens/s while it worked" not in render_report(summary={"grpo": {"generators": [one]}})
