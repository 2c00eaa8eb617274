"""SmolLM2-135M-Instruct from the package that carries it, through the whole pipeline of configs/smollm2.yaml, shorter.

`make test-long` installs the package and runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import PROJECT, run_stage_as_a_user
from transformers import AutoTokenizer

pytestmark = [pytest.mark.long, pytest.mark.cluster]
SHORTER = [
    *("cohort.num_train=40", "cohort.num_validation=10", "cohort.num_test=6"),
    *("encoders.ecg_steps=10", "encoders.cxr_steps=10", "encoders.lab_steps=10"),
    *("sft.epochs=1", "sft.validate_from=1", "sft.validation_studies=2", "grpo.steps=2", "grpo.checkpoint_every=0"),
    *("evaluation.bootstrap_resamples=100", "learner.spares=0", "rollout.spares=0"),
]


def test_the_recipe_runs_from_the_package_to_an_answer(tmp_path: Path) -> None:
    done = run_stage_as_a_user("configs/smollm2.yaml", tmp_path, "run", *SHORTER, timeout_s=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "writing SmolLM2-135M-Instruct" in done.stdout or "model: writing" in done.stdout
    run = tmp_path / "smollm2"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["grpo"]["steps"] == 2 and summary["grpo"]["completions"] == 2 * 2 * 4
    assert summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    assert {"sft", "grpo", "gain"} <= set(summary["evaluation"])
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    for token in ("<ecg>", "<cxr>", "<lab>", "<think>", "</answer>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    assert tokenizer.chat_template and "<|im_start|>" in tokenizer.chat_template
    (tmp_path / "labs.json").write_text('{"50912": 2.9, "51006": 48, "50971": 5.4}')
    command = ["diagnose", "--model", str(run / "model"), "--labs", str(tmp_path / "labs.json")]
    asked = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert asked.returncode == 0 and "contribution of each modality" in asked.stdout, asked.stdout + asked.stderr
