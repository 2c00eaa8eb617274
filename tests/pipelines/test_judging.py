"""A finished evaluation judged again from its answers, as the command line does it. No engine is started."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import pipelines.evaluate
from medtvt_rl.config import Config, load_config
from medtvt_rl.evaluation.diagnosis import DiagnosisEvaluator
from medtvt_rl.evaluation.records import StudyAnswers
from medtvt_rl.evaluation.rewards import RewardEvaluator
from pipelines import cli
from pipelines.judging import judged, same_prompts, save_answers, saved_answers
from pipelines.reporter import Reporter
from pipelines.stages import (
    SETTINGS_OF,
    StageError,
    evaluated_policies,
    resolved_settings,
    run_stage,
    selected,
    write_json,
)

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
TRUTHS = {"s0": ("Sepsis",), "s1": ("Hypertension", "Sepsis")}


class Store:
    """A study store in memory."""

    def study_ids(self, split: str) -> list[str]:
        return list(TRUTHS)

    def patient_id(self, study_id: str) -> str:
        return study_id

    def diagnoses(self, study_id: str) -> tuple[str, ...]:
        return TRUTHS[study_id]

    def findings(self, study_id: str) -> dict[str, bool] | None:
        return None

    def reference(self, study_id: str) -> str:
        return f"<think> evidence </think><answer> {'; '.join(TRUTHS[study_id])} </answer>"


def said(names: str) -> str:
    return f"<think> evidence </think><answer> {names} </answer>"


ANSWERS = {
    "sft": {i: StudyAnswers(sampled=(said("Gout"), said("Sepsis")), greedy=said("Gout")) for i in TRUTHS},
    "grpo": {
        i: StudyAnswers(sampled=(said("Sepsis"),) * 2, greedy=said("Sepsis") if i == "s0" else "?") for i in TRUTHS
    },
}


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run whose evaluation is finished; its tokenizer, prompts and store are in memory."""
    given = [f"run.root={tmp_path}", "run.name=done", "evaluation.bootstrap_resamples=50"]
    config = load_config(QUICKSTART, given)
    for stage in ("pretrain", "sft", "grpo"):
        (config.stage_folder(stage) / "model").mkdir(parents=True)
        finish(config, stage, {})
    monkeypatch.setattr(pipelines.evaluate.AutoTokenizer, "from_pretrained", lambda folder, **given: None)
    monkeypatch.setattr(pipelines.evaluate, "load_prompts", lambda config, tokenizer, split: [])
    monkeypatch.setattr(
        pipelines.evaluate, "make_evaluator", lambda config, prompts, split: DiagnosisEvaluator(config, split, Store())
    )
    monkeypatch.setattr(cli, "check_named", lambda config: None)
    save_answers(config, ANSWERS)
    summary, _ = judged(config, DiagnosisEvaluator(config, "test", Store()), ANSWERS, lambda *a: None, lambda n: None)
    finish(config, "evaluate", {"summary": {"evaluation": {**summary, "ablations": {"ecg": {"value": -0.1}}}}})
    return given


def finish(config: Config, stage: str, left: dict[str, Any]) -> None:
    settings = selected(resolved_settings(config), SETTINGS_OF[stage])
    marker = {"settings": settings, "seconds": 7.0, "peak_rss_bytes": 5, **left}
    write_json(config.stage_folder(stage) / "finished.json", marker)


def summary_of(overrides: list[str]) -> dict[str, Any]:
    return json.loads((load_config(QUICKSTART, overrides).folder / "summary.json").read_text())


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"run.root={tmp_path}"])
    assert saved_answers(config) == {} and not same_prompts({}, ["sft", "grpo"])
    odd = {"s0": StudyAnswers(sampled=(), greedy="line\nbreak \u2028 ünïcode \ud800")}
    save_answers(config, {"sft": odd, "grpo": odd})
    assert saved_answers(config) == {"sft": odd, "grpo": odd} and same_prompts(saved_answers(config), ["sft", "grpo"])
    assert not same_prompts(saved_answers(config), ["sft", "grpo", "model"])


def test_metrics_paper_judges_a_finished_run_without_an_engine_and_back(
    overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import actors.session

    def nobody(*given: Any) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(actors.session, "ray_session", nobody)
    assert cli.main(["evaluate", "-c", QUICKSTART, *overrides, "metrics=paper"]) == 0
    shown = capsys.readouterr()
    assert "as published: F1, mean over answers" in shown.out and shown.err == ""
    found = summary_of(overrides)
    assert found["stages"]["evaluate"]["seconds"] == 7.0, "asking cost what it cost"
    evaluation = found["evaluation"]
    assert evaluation["metrics"] == "paper" and evaluation["ablations"] == {"ecg": {"value": -0.1}}
    paper = evaluation["grpo"]["paper"]
    assert paper["f1"]["value"] == 1.0 and paper["answers_dropped"] == 1
    assert evaluation["grpo"]["f1_micro"]["value"] == pytest.approx(2 / 4), "the honest numbers stay"
    texts = {"bleu", "rouge_l_recall", "meteor", "bertscore_recall", "bleu_corpus"}
    assert (set(evaluation["notes"]) | set(paper)) >= texts and not set(evaluation["notes"]) & set(paper)
    for reason in evaluation["notes"].values():
        assert reason in shown.out
    report = (load_config(QUICKSTART, overrides).folder / "report.html").read_text()
    assert "<details open><summary>As the published evaluation" in report

    assert cli.main(["evaluate", "-c", QUICKSTART, *overrides, "evaluation.metrics=paper"]) == 0
    assert "finished before in 7 s" in capsys.readouterr().out, "nothing changed: not even judged again"
    assert cli.main(["evaluate", "-c", QUICKSTART, *overrides]) == 0
    assert "as published" not in capsys.readouterr().out
    assert summary_of(overrides)["evaluation"]["metrics"] == "honest"


def test_a_model_without_grpo_is_judged_alone_and_by_its_name(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [*overrides, "run.name=alone", f"model.init={tmp_path / 'published_rl'}", "run.stages=[cohort,evaluate]"]
    config = load_config(QUICKSTART, alone)
    assert evaluated_policies(config) == {"model": "published_rl"}
    save_answers(config, {"model": ANSWERS["grpo"]})
    finish(config, "evaluate", {"summary": {"evaluation": {"ablations": {}}}})
    assert cli.main(["evaluate", "-c", QUICKSTART, *alone, "metrics=paper"]) == 0
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if line.startswith("held-out"))
    assert "published_rl" in header and "as published: F1, mean over answers" in shown
    assert "GRPO" not in shown and "gain" not in shown
    evaluation = summary_of(alone)["evaluation"]
    assert evaluation["policies"] == {"model": "published_rl"} and "gain" not in evaluation
    assert evaluation["model"]["paper"]["f1"]["value"] == 1.0
    report = (config.folder / "report.html").read_text()
    assert "published_rl" in report and "after GRPO" not in report and "after SFT" not in report


def test_what_is_evaluated_follows_from_the_stages(tmp_path: Path) -> None:
    def named(*more: str) -> dict[str, str]:
        return evaluated_policies(load_config(QUICKSTART, [f"run.root={tmp_path}", *more]))

    both = {"sft": "after SFT", "grpo": "after GRPO"}
    assert named() == both
    assert named("run.stages=[cohort,pretrain,sft,evaluate]") == {"sft": "after SFT"}
    init = f"model.init={tmp_path / 'some'}"
    assert named(init, "run.stages=[cohort,grpo,evaluate]") == {"sft": "before GRPO", "grpo": "after GRPO"}
    config = load_config(QUICKSTART, [f"run.root={tmp_path}"])
    finish(config, "grpo", {})
    assert named("run.stages=[cohort,evaluate]") == both


def test_other_settings_of_what_is_asked_are_still_refused(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "-c", QUICKSTART, *overrides, "metrics=paper", "evaluation.num_samples=9"]) == 1
    assert "evaluation.num_samples: 4 then, 9 now" in capsys.readouterr().err
    assert cli.main(["evaluate", "-c", QUICKSTART, *overrides, "metrics=popular"]) == 2
    assert "evaluation.metrics" in capsys.readouterr().err


def test_answers_that_were_not_kept_are_named(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "metrics=paper"])
    (config.stage_folder("evaluate") / "answers.jsonl").unlink()
    with (
        Reporter(config.folder, stream=io.StringIO()) as reporter,
        pytest.raises(StageError, match=r"its answers are not in .*delete that folder"),
    ):
        run_stage("evaluate", config, reporter)


def test_a_task_without_published_metrics_says_so(overrides: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "metrics=paper"])
    evaluator = RewardEvaluator(config, [])
    evaluator.evaluate = lambda answers: DiagnosisEvaluator(config, "test", Store()).evaluate(answers)  # type: ignore
    evaluator.paired_gain = DiagnosisEvaluator(config, "test", Store()).paired_gain  # type: ignore
    summary, _ = judged(config, evaluator, ANSWERS, lambda *a: None, lambda n: None)
    assert "RewardEvaluator" in summary["notes"]["paper"]
