"""What a step measures of importance ratios and tokens, and completions of no or one token."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_policy import PlainEngine, TinyItems, TinyPolicy, make_sequences

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.config import Config
from medtvt_rl.learner.grpo_learner import GrpoLearner
from medtvt_rl.learner.scoring import ScoredSequence, score_sequences
from medtvt_rl.types import LearnerStep, TrainingSequence

torch.set_num_threads(1)
VERSION = 3
SPREAD = ("importance_ratio_mean", "importance_ratio_p99", "importance_ratio_max", "ess_share")


def _config(token_budget: int = 64, level: str = "token") -> Config:
    config = Config()
    config.learner.token_budget = token_budget
    config.grpo.loss.importance.level = level  # type: ignore[assignment]
    return config


def _learner(config: Config) -> GrpoLearner:
    return GrpoLearner(PlainEngine(TinyPolicy()), TinyItems(), config)


def _step(learner: GrpoLearner, sequences: list[TrainingSequence], learning_rate: float = 1e-2) -> LearnerStep:
    tokens = sum(len(s.completion.token_ids) for s in sequences)
    denominators = Denominators(num_sequences=len(sequences), num_tokens=tokens, max_new_tokens=16)
    return learner.train_step(sequences, denominators, learning_rate, VERSION)


def _shortened(sequence: TrainingSequence, length: int, group_id: int | None = None) -> TrainingSequence:
    completion = sequence.completion
    reference = sequence.reference_logprobs
    return dataclasses.replace(
        sequence,
        group_id=sequence.group_id if group_id is None else group_id,
        completion=dataclasses.replace(
            completion,
            token_ids=completion.token_ids[:length],
            behaviour_logprobs=completion.behaviour_logprobs[:length],
            policy_versions=completion.policy_versions[:length],
        ),
        reference_logprobs=None if reference is None else reference[:length],
    )


def _log_ratios(sequences: list[TrainingSequence]) -> list[np.ndarray]:
    scored = [
        ScoredSequence(prompt_ids=s.prompt.token_ids, completion_ids=s.completion.token_ids, item_id=s.prompt.item_id)
        for s in sequences
    ]
    logprobs = score_sequences(TinyPolicy(), scored, TinyItems(), 1.0, 1000)
    return [ours.numpy().astype(float) - s.completion.behaviour_logprobs for ours, s in zip(logprobs, sequences)]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_spread_of_importance_ratios(level: str) -> None:
    sequences = make_sequences(12)
    metrics = _step(_learner(_config(level=level)), sequences).metrics
    logs = _log_ratios(sequences)
    ratios = np.exp(np.concatenate(logs) if level == "token" else np.array([log.sum() for log in logs]))
    weights = np.minimum(ratios, 2.0)
    assert metrics["importance_ratio_mean"] == pytest.approx(ratios.mean(), rel=1e-5)
    assert metrics["importance_ratio_max"] == pytest.approx(ratios.max(), rel=1e-5)
    assert metrics["importance_ratio_p99"] == pytest.approx(
        np.quantile(ratios, 0.99, method="inverted_cdf"), rel=0.00502
    )
    assert metrics["ess_share"] == pytest.approx(weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-5)
    assert metrics["ess_share"] < 1 < metrics["importance_ratio_p99"] <= metrics["importance_ratio_max"]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_spread_does_not_depend_on_micro_batches_or_padding(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    sequences = make_sequences(11)
    one = _step(_learner(_config(10_000, level)), sequences).metrics
    many = _step(_learner(_config(20, level)), sequences).metrics
    monkeypatch.setattr(PlainEngine, "all_reduce", lambda self, v, op: v + 3 if v.dtype == torch.int64 else v)
    padded = _step(_learner(_config(20, level)), sequences).metrics
    assert padded["micro_batches"] == many["micro_batches"] + 3 > one["micro_batches"]
    for name in (*SPREAD, "tokens", "importance_cut_share", "entropy"):
        assert one[name] == pytest.approx(many[name], rel=1e-5) == pytest.approx(padded[name], rel=1e-5), name


def test_tokens_are_those_of_prompts_and_completions() -> None:
    sequences = make_sequences(6)
    metrics = _step(_learner(_config()), sequences).metrics
    assert metrics["tokens"] == sum(len(s.prompt.token_ids) + len(s.completion.token_ids) for s in sequences)
    assert metrics["num_tokens"] == sum(len(s.completion.token_ids) for s in sequences)
    assert metrics["updates"] == 1.0


@pytest.mark.parametrize("token_budget", [20, 1000])
def test_empty_completions_and_groups_of_them_enter_nothing(token_budget: int) -> None:
    sequences = make_sequences(6)
    empty = [_shortened(s, 0, group_id=9) for s in make_sequences(2, seed=1)]
    empty.append(_shortened(make_sequences(1, seed=2)[0], 0))
    tokens = sum(len(s.completion.token_ids) for s in sequences)
    denominators = Denominators(num_sequences=9, num_tokens=tokens, max_new_tokens=16)
    found = []
    for batch in (sequences, [*empty[:2], *sequences, empty[2]]):
        learner = _learner(_config(token_budget))
        step = learner.train_step(batch, denominators, 1e-2, VERSION)
        assert step.skipped is None and step.culprits == ()
        found.append((step.metrics, {k: v.clone() for k, v in learner.engine.policy.state_dict().items()}))
    (without, weights), (with_empty, other) = found
    assert all(torch.allclose(weights[name], other[name], atol=1e-6) for name in weights)
    for name in without.keys() - {"seconds", "micro_batches"}:
        assert with_empty[name] == pytest.approx(without[name], abs=1e-6), name


def test_a_batch_of_empty_completions_alone_has_no_gradient() -> None:
    learner = _learner(_config())
    step = _step(learner, [_shortened(s, 0) for s in make_sequences(4)])
    assert step.skipped is None and step.metrics["gradient_norm"] == 0.0
    assert all(math.isfinite(value) for value in step.metrics.values())
    assert [step.metrics[name] for name in SPREAD] == [1.0] * 4
    assert step.metrics["tokens"] == step.metrics["num_tokens"] == step.metrics["entropy"] == 0.0
    assert all(torch.equal(v, TinyPolicy().state_dict()[k]) for k, v in learner.engine.policy.state_dict().items())


def test_completions_of_one_token_train() -> None:
    sequences = [_shortened(s, 1) for s in make_sequences(4)]
    step = _step(_learner(_config()), sequences)
    ratios = np.exp(np.concatenate(_log_ratios(sequences)))
    assert step.skipped is None and step.metrics["gradient_norm"] > 0
    assert step.metrics["num_tokens"] == step.metrics["num_sequences"] == 4
    assert step.metrics["importance_ratio_max"] == pytest.approx(ratios.max(), rel=1e-5)
