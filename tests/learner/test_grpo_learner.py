"""The training step on one rank: invariances, measurement, and refusal of what is not finite."""

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
from medtvt_rl.types import TrainingSequence

torch.set_num_threads(1)
VERSION = 3


def _config(token_budget: int = 64, num_updates: int = 1) -> Config:
    config = Config()
    config.learner.token_budget = token_budget
    config.grpo.updates_per_batch = num_updates
    return config


def _denominators(sequences: list[TrainingSequence]) -> Denominators:
    tokens = sum(len(s.completion.token_ids) for s in sequences)
    return Denominators(num_sequences=len(sequences), num_tokens=tokens, max_new_tokens=16)


def _train(
    sequences: list[TrainingSequence], config: Config, steps: int = 2
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    learner = GrpoLearner(PlainEngine(TinyPolicy()), TinyItems(), config)
    for _ in range(steps):
        metrics = learner.train_step(sequences, _denominators(sequences), 1e-2, VERSION).metrics
    return metrics, {k: v.clone() for k, v in learner.engine.policy.state_dict().items()}


def _largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_micro_batches_change_neither_weights_nor_metrics() -> None:
    sequences = make_sequences(11)
    one, weights_one = _train(sequences, _config(token_budget=10_000))
    many, weights_many = _train(sequences, _config(token_budget=20))
    assert many["micro_batches"] > 4 and one["micro_batches"] == 1
    assert _largest_difference(weights_one, weights_many) < 1e-5
    for name in ("loss", "kl", "entropy", "fresh_gap_mean", "fresh_gap_max", "gradient_norm"):
        assert one[name] == pytest.approx(many[name], abs=1e-5), name


def test_a_padding_micro_batch_has_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = make_sequences(6)
    plain, weights = _train(sequences, _config())
    monkeypatch.setattr(PlainEngine, "all_reduce", lambda self, v, op: v + 3 if v.dtype == torch.int64 else v)
    padded, padded_weights = _train(sequences, _config())
    assert padded["micro_batches"] == plain["micro_batches"] + 3
    assert padded["num_tokens"] == plain["num_tokens"]
    assert _largest_difference(weights, padded_weights) < 1e-6


def test_fresh_gap_compares_only_tokens_of_this_version() -> None:
    sequences = make_sequences(8, version=VERSION)
    policy = TinyPolicy()
    metrics = (
        GrpoLearner(PlainEngine(policy), TinyItems(), _config())
        .train_step(sequences, _denominators(sequences), 0.0, VERSION)
        .metrics
    )
    scored = [
        ScoredSequence(prompt_ids=s.prompt.token_ids, completion_ids=s.completion.token_ids, item_id=s.prompt.item_id)
        for s in sequences
    ]
    logprobs = score_sequences(policy, scored, TinyItems(), 1.0, 1000)
    gaps = [
        np.abs(ours.numpy() - s.completion.behaviour_logprobs)[s.completion.policy_versions == VERSION]
        for ours, s in zip(logprobs, sequences)
    ]
    assert metrics["fresh_tokens"] == sum(map(len, gaps)) < metrics["num_tokens"]
    assert metrics["fresh_gap_mean"] == pytest.approx(float(np.concatenate(gaps).mean()), abs=1e-6)
    assert metrics["fresh_gap_max"] == pytest.approx(float(np.concatenate(gaps).max()), abs=1e-6)


def _with_behaviour(sequence: TrainingSequence, value: float) -> TrainingSequence:
    logprobs = np.full_like(sequence.completion.behaviour_logprobs, value)
    completion = dataclasses.replace(sequence.completion, behaviour_logprobs=logprobs)
    return dataclasses.replace(sequence, completion=completion)


def test_a_nan_of_the_engine_is_counted_and_stops_the_step() -> None:
    sequences = make_sequences(6)
    sequences[0] = _with_behaviour(sequences[0], math.nan)
    metrics, weights = _train(sequences, _config(), steps=1)
    assert metrics["fresh_not_finite"] == len(sequences[0].completion.token_ids)
    assert metrics["fresh_gap_max"] == math.inf and math.isfinite(metrics["fresh_gap_mean"])
    assert metrics["skipped"] == 1.0
    assert _largest_difference(weights, TinyPolicy().state_dict()) == 0.0


def test_the_first_of_several_updates_equals_a_single_one_and_later_ratios_move() -> None:
    sequences = make_sequences(6)
    single, _ = _train(sequences, _config(), steps=1)
    double, weights = _train(sequences, _config(num_updates=2), steps=1)
    assert single["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert abs(double["ratio_mean"] - 1.0) > 1e-4
    assert double["fresh_gap_mean"] == pytest.approx(single["fresh_gap_mean"], abs=1e-6)
    assert _largest_difference(weights, TinyPolicy().state_dict()) > 1e-3


def test_no_sequences_and_half_a_reference_are_refused() -> None:
    learner = GrpoLearner(PlainEngine(TinyPolicy()), TinyItems(), _config())
    with pytest.raises(ValueError, match="sequences: got none"):
        learner.train_step([], Denominators(num_sequences=1, num_tokens=1, max_new_tokens=1), 0.0, 0)
    mixed = make_sequences(2)[:1] + make_sequences(2, with_reference=False)[1:]
    with pytest.raises(ValueError, match="1 of 2 sequences have them"):
        learner.train_step(mixed, _denominators(mixed), 0.0, 0)


def test_frozen_parameters_stay_and_export_leaves_them_out() -> None:
    sequences = make_sequences(6)
    learner = GrpoLearner(PlainEngine(TinyPolicy(), weight_decay=0.1), TinyItems(), _config())
    learner.train_step(sequences, _denominators(sequences), 1e-2, VERSION)
    assert torch.equal(learner.engine.policy.frozen.weight, TinyPolicy().frozen.weight)
    exported = learner.export(version=4)
    assert exported is not None and exported.version == 4
    exported.verify()
    names = {name for name, _ in exported.tensors()}
    assert "embedding.weight" in names and not any(name.startswith("frozen") for name in names)
