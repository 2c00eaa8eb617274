"""A plain text task from its YAML alone: SFT of a fresh text model, GRPO that learns, evaluation, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import run_stage_as_a_user

SMALL = [
    "sft.epochs=1",
    "sft.num_workers=1",
    "sft.validate_from=1",
    "sft.validation_studies=8",
    "sft.validation_samples=2",
    "grpo.steps=2",
    "grpo.groups_per_step=4",
    "grpo.group_size=4",
    "grpo.held_out.max_prompts=4",
    "evaluation.num_generators=1",
    "evaluation.num_samples=2",
    "evaluation.max_studies=12",
    "evaluation.bootstrap_resamples=100",
    "learner.spares=0",
    "rollout.spares=0",
]


@pytest.mark.long
@pytest.mark.cluster
def test_the_text_task_learns_and_speaks_of_no_patients(tmp_path: Path) -> None:
    done = run_stage_as_a_user("configs/text_task.yaml", tmp_path, "run", timeout_s=1100)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "text_task"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["stages"]) == {"sft", "grpo", "evaluate"}
    assert summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    for policy in ("sft", "grpo"):
        assert set(summary["evaluation"][policy]["reward"]) == {"value", "low", "high"}
    assert summary["evaluation"]["gain"]["low"] > 0.1, "it learns"
    assert summary["evaluation"]["ablations"] == {}
    assert {path.name for path in (run / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    report = (run / "report.html").read_text()
    assert "paired over prompts" in done.stdout and "Ground truth" in report
    for word in ("patient", "clinical", "simulated", "disease", "modality", "ECG", "Jaccard"):
        assert word not in done.stdout, word
        assert word not in report.partition("<h2>Configuration")[0], word
    for noise in ("WARNING", "(pid=", "vllm", "Traceback"):
        assert noise not in done.stdout, done.stdout


@pytest.mark.long
@pytest.mark.cluster
def test_it_runs_with_an_algorithm_a_role_and_an_engine_of_one_s_own(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(written))
    own = [
        "rollout.make_engine=plain_engine:PlainEngine",
        "grpo.layout=memory_role:MemoryLayout",
        "grpo.advantage=algorithm:by_rank",
        "grpo.loss.kind=algorithm:quadratic",
        "grpo.max_staleness=1",
        "rollout.spares=1",
    ]
    done = run_stage_as_a_user("configs/text_task.yaml", tmp_path, "run", *SMALL, *own)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "text_task"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["grpo"]["steps"] == 2 and summary["grpo"]["discarded"] == 0
    assert summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    assert summary["grpo"].get("restarts/memory", 0) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["stage"] == "grpo" and "reward/rarity" in row]
    assert len(steps) == 2 and all(0 < row["reward/rarity"] <= 1 for row in steps)
    assert (run / "logs" / "memory_0.log").is_file()
