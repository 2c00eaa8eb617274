"""The whole system once, small: real vLLM, DeepSpeed and Ray processes, started as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import SMALL, medtvt_rl

METRICS = [
    "jaccard",
    "jaccard_greedy",
    "f1_micro",
    "f1_macro",
    "parse_rate",
    "findings_f1_ecg",
    "findings_f1_cxr",
    "findings_f1_lab",
]


@pytest.mark.cluster
def test_the_summary_holds_what_a_reader_looks_for(root: Path) -> None:
    summary = json.loads((root / "small" / "summary.json").read_text())
    assert all(summary["stages"][name]["seconds"] > 0 for name in ("pretrain", "sft", "grpo", "evaluate"))
    for policy in ("sft", "grpo"):
        for name in METRICS:
            assert set(summary["evaluation"][policy][name]) >= {"value", "low", "high"}, name
    assert set(summary["evaluation"]["ablations"]) == {"ecg", "cxr", "lab"}
    assert set(summary["evaluation"]["gain"]) >= {"value", "low", "high"}
    assert summary["grpo"]["steps"] == 3
    assert summary["grpo"]["completions"] == 48
    assert summary["grpo"]["max_staleness_seen"] <= 2
    assert summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    assert {"reward_first", "reward_last"} <= set(summary["grpo"])
    assert summary["peak_rss_bytes"] > 0


@pytest.mark.cluster
def test_the_run_folder_is_complete(root: Path) -> None:
    run = root / "small"
    for name in ("config.yaml", "report.html", "metrics.jsonl", "model/config.json", "model/model.safetensors"):
        assert (run / name).is_file(), name
    assert any((run / "tensorboard").iterdir())
    groups = [json.loads(line) for line in (run / "journal" / "groups.jsonl").read_text().splitlines()]
    assert sorted(group["group_id"] for group in groups) == list(range(12))


@pytest.mark.cluster
def test_a_reward_that_raises_is_reported_with_its_completion_and_does_not_end_the_run(root: Path) -> None:
    groups = [json.loads(line) for line in (root / "small" / "journal" / "groups.jsonl").read_text().splitlines()]
    failures = {name: reason for group in groups for name, reason in group["failures"].items()}
    assert failures
    assert set(failures.values()) == {"flaky: ValueError: this one I will not score"}
    assert "could not be scored, e.g." in (root / "first_output.txt").read_text()


@pytest.mark.cluster
def test_the_terminal_shows_progress_and_no_noise(root: Path) -> None:
    text = (root / "first_output.txt").read_text()
    for word in ("pretrain", "sft", "grpo", "evaluate", "report:"):
        assert word in text
    for noise in ("WARNING", "(pid=", "vllm", "Traceback", "raylet"):
        assert noise not in text, text


@pytest.mark.cluster
def test_finished_stages_are_not_run_again_and_other_settings_are_refused(root: Path) -> None:
    again = medtvt_rl(root, "run", *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 4
    changed = medtvt_rl(root, "sft", *SMALL, "sft.epochs=3")
    assert changed.returncode == 1
    assert "sft.epochs: 2 then, 3 now" in changed.stderr
