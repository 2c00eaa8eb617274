"""A published checkpoint through the stages, unchanged: evaluated as it is, with its adapter kept; merged, as an import
is by default, through sft, grpo, evaluate. What loads, trains and saves a kept adapter is tested in tests/model."""

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

from medtvt_rl.data.labs import PERCENTILES_FILE
from medtvt_rl.data.tokenizer import train_tokenizer
from medtvt_rl.model.config import UNTRAINED_STAND_INS
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.reference_folder import import_reference

COHORT = [
    *("cohort.num_train=8", "cohort.num_validation=2", "cohort.num_test=2", "cohort.film_size=224"),
    *("data.film.size=224", "rollout.engine.max_model_len=1024", "rollout.sampling.max_new_tokens=8"),
    *("evaluation.num_samples=1", "evaluation.num_generators=1", "evaluation.bootstrap_resamples=20"),
    *("evaluation.ablations=false", "learner.spares=0", "rollout.spares=0"),
]
TRAINING = [
    "run.name=imported",
    "run.stages=[cohort,sft,grpo,evaluate]",
    *("model.lora.rank=16", "model.lora.alpha=16", "model.lora.train_embeddings=false"),
    *("sft.epochs=1", "sft.batch_size=8", "sft.num_workers=1", "sft.validation_studies=1", "sft.validation_samples=1"),
    *("grpo.steps=1", "grpo.groups_per_step=1", "grpo.group_size=2", "grpo.loss.kl.coefficient=0"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `kept` and `merged`, folders of a published checkpoint by what became of its low-rank pairs."""
    root = tmp_path_factory.mktemp("published")
    files = write_files(root, golden_state())
    train_tokenizer(["Name the diagnoses of this patient. <answer>Sepsis</answer>"], 310).save_pretrained(
        root / "tokenizer"
    )
    for name in ("kept", "merged"):
        import_reference(
            files["checkpoint"],
            files["params"],
            files["vit_config"],
            root / name,
            special_tokens=TOKENS,
            tokenizer=root / "tokenizer",
            keep_adapter=name == "kept",
        )
    return root


def run(root: Path, start: str, *settings: str) -> subprocess.CompletedProcess[str]:
    overrides = [f"run.root={root}", f"model.init={root / start}", *COHORT, *settings]
    return subprocess.run(
        [sys.executable, "-m", "pipelines.run", "-c", "configs/quickstart.yaml", *overrides],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )


@pytest.mark.cluster
def test_a_published_checkpoint_is_evaluated_without_a_stage_of_training(root: Path) -> None:
    done = run(root, "kept", "run.name=scored", "run.stages=[cohort,evaluate]", "metrics=paper")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    evaluation = json.loads((root / "scored" / "summary.json").read_text())["evaluation"]
    assert evaluation["policies"] == {"model": "kept"} and "grpo" not in evaluation and "gain" not in evaluation
    assert evaluation["model"]["paper"]["answers_dropped"] is not None and "jaccard" in evaluation["model"]
    assert UNTRAINED_STAND_INS in evaluation["remarks"] and UNTRAINED_STAND_INS in done.stdout
    assert "kept" in next(line for line in done.stdout.splitlines() if line.startswith("held-out"))
    assert (root / "scored" / "model" / "adapter" / "adapter_config.json").is_file()
    assert (root / "scored" / "model" / PERCENTILES_FILE).is_file()


@pytest.mark.long
@pytest.mark.cluster
def test_a_published_checkpoint_goes_through_the_stages(root: Path) -> None:
    done = run(root, "merged", *TRAINING)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads((root / "imported" / "summary.json").read_text())
    assert summary["grpo"]["completions"] == 2 and summary["grpo"]["logprob_max_abs_diff"] <= 1e-4
    assert "jaccard" in summary["evaluation"]["grpo"] and "remarks" not in summary["evaluation"]
    model = load_policy(root / "imported" / "model")
    assert model.config.study_placeholders == list(TOKENS.values())
    assert (root / "imported" / "model" / PERCENTILES_FILE).is_file()
