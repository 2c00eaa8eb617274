"""A published checkpoint through the stages, unchanged: sft on its kept adapter, grpo, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from golden_model import TOKENS, golden_state, write_files
from small_run import PROJECT

from medtvt_rl.data.tokenizer import train_tokenizer
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.reference_folder import import_reference
from pipelines.diagnose import PERCENTILES_FILE

SETTINGS = [
    "run.name=imported",
    "run.stages=[cohort,sft,grpo,evaluate]",
    *("cohort.num_train=8", "cohort.num_validation=2", "cohort.num_test=2", "cohort.film_size=224"),
    *("data.film.size=224", "model.lora.rank=16", "model.lora.alpha=16", "model.lora.train_embeddings=false"),
    *("sft.epochs=1", "sft.batch_size=8", "sft.num_workers=1", "sft.validation_studies=1", "sft.validation_samples=1"),
    *("grpo.steps=1", "grpo.groups_per_step=1", "grpo.group_size=2", "grpo.loss.kl.coefficient=0"),
    *("rollout.engine.max_model_len=1024", "rollout.sampling.max_new_tokens=8"),
    *("evaluation.num_samples=1", "evaluation.num_generators=1", "evaluation.bootstrap_resamples=20"),
    "evaluation.ablations=false",
]


@pytest.mark.cluster
def test_a_published_checkpoint_goes_through_the_stages(tmp_path: Path) -> None:
    files = write_files(tmp_path, golden_state())
    train_tokenizer(["Name the diagnoses of this patient. <answer>Sepsis</answer>"], 310).save_pretrained(
        tmp_path / "tokenizer"
    )
    import_reference(
        files["checkpoint"],
        files["params"],
        files["vit_config"],
        tmp_path / "start",
        special_tokens=TOKENS,
        tokenizer=tmp_path / "tokenizer",
        keep_adapter=True,
    )
    overrides = [f"run.root={tmp_path}", f"model.init={tmp_path / 'start'}", *SETTINGS]
    run = subprocess.run(
        [sys.executable, "-m", "pipelines.run", "-c", "configs/quickstart.yaml", *overrides],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    summary = json.loads((tmp_path / "imported" / "summary.json").read_text())
    assert summary["grpo"]["completions"] == 2 and summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    assert "jaccard" in summary["evaluation"]["grpo"]
    model = load_policy(tmp_path / "imported" / "model")
    assert model.config.study_placeholders == list(TOKENS.values())
    assert (tmp_path / "imported" / "model" / PERCENTILES_FILE).is_file()
