"""DeepSpeed on two real ranks against one process of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_rank import LEARNING_RATE, NUM_SEQUENCES, VERSION, config, denominators, shared_policy, text_sequences
from tiny_policy import PlainEngine, TinyItems, TinyPolicy, make_sequences
from two_ranks import run_two_ranks

from medtvt_rl.learner.deepspeed_engine import parameter_groups
from medtvt_rl.learner.engine import EngineSettings
from medtvt_rl.learner.grpo_learner import GrpoLearner
from medtvt_rl.learner.training_state import rank_file

torch.set_num_threads(1)
AGREED = (
    *("loss", "kl", "entropy", "num_tokens", "tokens", "fresh_gap_mean", "fresh_gap_max", "gradient_norm"),
    *("importance_ratio_mean", "importance_ratio_max", "ess_share"),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks work; a gang of one has left its state after a step there."""
    folder = tmp_path_factory.mktemp("ranks")
    learner = GrpoLearner(PlainEngine(TinyPolicy(), weight_decay=0.1), TinyItems(), config())
    sequences = make_sequences(NUM_SEQUENCES)
    learner.train_step(sequences, denominators(sequences), LEARNING_RATE, VERSION)
    learner.state(copy=False).write(rank_file(folder / "one_rank", 0))
    return folder


@pytest.fixture(scope="module")
def ranks(checkpoints: Path) -> list[dict[str, Any]]:
    """Results of every scenario on both ranks."""
    run_two_ranks("deepspeed_rank.py", checkpoints)
    return [torch.load(checkpoints / f"results_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same two steps over the whole batch in this process."""
    sequences = make_sequences(NUM_SEQUENCES)
    learner = GrpoLearner(PlainEngine(TinyPolicy(), weight_decay=0.1), TinyItems(), config())
    steps = [learner.train_step(sequences, denominators(sequences), LEARNING_RATE, VERSION) for _ in range(2)]
    return {"metrics": [step.metrics for step in steps], "weights": dict(learner.engine.policy.named_parameters())}


def _largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].detach().float() - b[name].detach().float()).abs().max()) for name in a)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_agree_with_one_process(ranks: list[dict[str, Any]], plain: dict[str, Any], stage: int) -> None:
    for rank in ranks:
        found = rank[f"float32-{stage}"]
        assert _largest_difference(found["weights"], plain["weights"]) < 1e-5
        for ours, theirs in zip(found["metrics"], plain["metrics"]):
            for name in AGREED:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
            assert ours["importance_ratio_p99"] == pytest.approx(theirs["importance_ratio_p99"], rel=0.011)


@pytest.fixture(scope="module")
def plain_llama() -> dict[str, Any]:
    """The Llama's two steps over the whole batch in this process."""
    sequences = text_sequences()
    learner = GrpoLearner(PlainEngine(shared_policy(), weight_decay=0.1), None, config())
    metrics = [learner.train_step(sequences, denominators(sequences), LEARNING_RATE, VERSION).metrics for _ in range(2)]
    return {"metrics": metrics, "weights": dict(learner.engine.policy.named_parameters())}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_agree_when_one_has_no_second_token_to_predict(
    ranks: list[dict[str, Any]], plain_llama: dict[str, Any], stage: int
) -> None:
    for rank in ranks:
        found = rank[f"shared-prompts-{stage}"]
        assert _largest_difference(found["weights"], plain_llama["weights"]) < 1e-5
        for ours, theirs in zip(found["metrics"], plain_llama["metrics"]):
            for name in ("loss", "entropy", "num_tokens", "gradient_norm"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_bfloat16_stays_near(ranks: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    found = ranks[0]["bfloat16-2"]
    for ours, theirs in zip(found["metrics"], plain["metrics"]):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-2)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=5e-2)
    # Adam's first steps have the size of the learning rate, whichever way the gradient was rounded.
    assert _largest_difference(found["weights"], plain["weights"]) < 4 * LEARNING_RATE


@pytest.mark.parametrize("name", ["float32-0", "float32-1", "float32-2", "float32-3", "bfloat16-2"])
@pytest.mark.parametrize("cause", ["advantage", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_all_and_leaves_no_trace(
    ranks: list[dict[str, Any]], name: str, cause: str
) -> None:
    for rank in ranks:
        found, straight = rank[f"{cause}-{name}"], rank[name]
        step, again = found["step"], found["next"]
        assert step.metrics["skipped"] == 1.0 and again.metrics["skipped"] == 0.0
        assert _largest_difference(found["before"], found["after"]) == 0.0
        assert _largest_difference(found["last"], straight["weights"]) == 0.0
        assert again.metrics["gradient_norm"] == straight["metrics"][1]["gradient_norm"]
        if cause == "gradient" and name == "float32-3":
            assert step.culprits == tuple(range((NUM_SEQUENCES + 1) // 2))
            assert step.skipped.endswith("parameters are sharded, so every group is named")
        else:
            assert step.culprits == (found["broken"],)
            assert step.skipped == f"not finite: {cause} of group {found['broken']}"


@pytest.mark.parametrize("name", ["float32-0", "float32-1", "float32-2", "float32-3", "bfloat16-2"])
def test_a_resumed_run_is_bitwise_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        found = rank[f"resume-{name}"]
        assert _largest_difference(found["straight"], found["resumed"]) == 0.0
        assert _largest_difference(found["held"], found["resumed"]) > 0.0
        for a, b in zip(found["drawn"], found["redrawn"]):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["float32-0", "float32-1", "float32-2", "float32-3", "bfloat16-2"])
def test_another_zero_stage_goes_on_from_the_same_state(ranks: list[dict[str, Any]], name: str) -> None:
    """Stages 0 to 3 sum gradients in different orders, hence not bitwise."""
    for rank in ranks:
        found = rank[f"resume-{name}"]
        tolerance = 1e-5 if name.startswith("float32") else 4 * LEARNING_RATE
        assert _largest_difference(found["straight"], found["crossed"]) < tolerance


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_goes_on_where_two_were(ranks: list[dict[str, Any]], checkpoints: Path, stage: int) -> None:
    learner = GrpoLearner(PlainEngine(TinyPolicy(), weight_decay=0.1), TinyItems(), config())
    learner.load_checkpoint(checkpoints / f"checkpoint_{stage}_torch.float32")
    sequences = make_sequences(NUM_SEQUENCES)
    learner.train_step(sequences, denominators(sequences), LEARNING_RATE, VERSION)
    found = dict(learner.engine.policy.named_parameters())
    assert _largest_difference(found, ranks[0][f"resume-float32-{stage}"]["straight"]) < 1e-5


def test_two_ranks_go_on_where_one_was(ranks: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    for rank in ranks:
        assert _largest_difference(rank["of-one-rank"], plain["weights"]) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_only_rank_zero_exports_what_trains(ranks: list[dict[str, Any]], stage: int) -> None:
    found = ranks[0][f"float32-{stage}"]
    trained = {name: tensor for name, tensor in found["weights"].items() if not name.startswith("frozen")}
    assert _largest_difference(found["exported"], trained) == 0.0
    assert ranks[1][f"float32-{stage}"]["exported"] is None


def test_settings_and_groups() -> None:
    with pytest.raises(ValueError, match="zero_stage: got 4"):
        EngineSettings(zero_stage=4)
    assert EngineSettings(zero_stage=0, dtype=torch.bfloat16).effective_stage == 2
    groups = parameter_groups(TinyPolicy(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim < 2 for p in groups[1]["params"])
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        parameter_groups(TinyPolicy().requires_grad_(False), 0.1)
