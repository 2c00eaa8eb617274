"""DeepSpeed on two real ranks against one process of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed_rank import LEARNING_RATE, NUM_SEQUENCES, VERSION, config, denominators, shared_policy, text_sequences
from tiny_policy import PlainEngine, TinyItems, TinyPolicy, make_sequences
from two_ranks import run_two_ranks

from medtvt_rl.learner.deepspeed_engine import EngineSettings, parameter_groups
from medtvt_rl.learner.grpo_learner import GrpoLearner

torch.set_num_threads(1)
AGREED = (
    *("loss", "kl", "entropy", "num_tokens", "tokens", "fresh_gap_mean", "fresh_gap_max", "gradient_norm"),
    *("importance_ratio_mean", "importance_ratio_max", "ess_share"),
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of every scenario on both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks("deepspeed_rank.py", folder)
    return [torch.load(folder / f"results_{rank}.pt", weights_only=False) for rank in range(2)]


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


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_is_bitwise_the_same(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        found = rank[f"resume-{stage}"]
        assert _largest_difference(found["straight"], found["resumed"]) == 0.0
        for a, b in zip(found["drawn"], found["redrawn"]):
            assert a.tolist() == b.tolist()


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
