"""The supervised loop on one rank: batches, invariance, early stopping, and failure."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import VOCABULARY, PlainEngine, TinyItems, TinyPolicy

from medtvt_rl.learner.config import SupervisedConfig
from medtvt_rl.learner.scoring import ScoredSequence
from medtvt_rl.learner.supervised import NonFiniteLossError, SupervisedTrainer, Validation, epoch_plan
from medtvt_rl.learner.validation import HeldOutLoss

torch.set_num_threads(1)


def _examples(count: int = 24) -> list[ScoredSequence]:
    """Answers that repeat the prompt's last token: learnable."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCABULARY, 2 + i % 4).astype(np.int32) for i in range(count)]
    return [
        ScoredSequence(prompt_ids=p, completion_ids=np.full(1 + i % 5, p[-1], dtype=np.int32), item_id=f"item{i % 5}")
        for i, p in enumerate(prompts)
    ]


class Source:
    """The same examples in every epoch."""

    def epoch(self, epoch: int) -> list[ScoredSequence]:
        return _examples()


class Seen:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []

    def step(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        assert step == len(self.steps) + 1 <= total_steps
        self.steps.append(metrics)

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.epochs.append(metrics)


def _run(
    scores: list[float] | None = None, token_budget: int = 1000, policy: TinyPolicy | None = None, **settings: Any
) -> tuple[Any, Seen, list[int], TinyPolicy]:
    policy, seen, kept = policy or TinyPolicy(), Seen(), list[int]()
    engine = PlainEngine(policy)
    held_out = HeldOutLoss(engine, TinyItems(), _examples(), token_budget)

    def validate() -> Validation:
        loss = held_out()
        return Validation(score=scores[len(seen.epochs)] if scores else -loss, metrics={"validation_loss": loss})

    config = SupervisedConfig(**{"epochs": 6, "batch_size": 8, "learning_rate": 1e-2, **settings})
    trainer = SupervisedTrainer(
        engine,
        TinyItems(),
        Source(),
        config,
        seed=1,
        token_budget=token_budget,
        validate=validate,
        keep_best=kept.append,
        keep=lambda progress: None,
        observer=seen,
    )
    return trainer.run(), seen, kept, policy


def test_an_epoch_takes_each_example_at_most_once_in_batches_of_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 331).tolist()
    plan = epoch_plan(lengths, 16, 2, (0, 0))
    taken = Counter(i for batch in plan for i in batch)
    assert set(taken.values()) == {1} and len(taken) == 331 - 331 % 16
    assert all(len(batch) == 16 for batch in plan)
    spread = np.mean([max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in plan])
    assert spread < 15
    assert plan == epoch_plan(lengths, 16, 2, (0, 0)) != epoch_plan(lengths, 16, 2, (0, 1))


def test_few_examples_make_one_batch_and_impossible_sizes_are_refused() -> None:
    assert [len(batch) for batch in epoch_plan([3] * 5, 32, 2, 0)] == [4]
    with pytest.raises(ValueError, match="multiple of the 2 ranks"):
        epoch_plan([3] * 9, 5, 2, 0)
    with pytest.raises(ValueError, match="at least one for each of the 2 ranks"):
        epoch_plan([3], 2, 2, 0)


def test_the_loss_falls_and_is_a_mean_over_answer_tokens() -> None:
    result, seen, _, policy = _run()
    assert result.steps == len(seen.steps) == 18 and result.epochs == 6
    assert seen.epochs[-1]["validation_loss"] < seen.epochs[0]["validation_loss"] < math.log(VOCABULARY) + 0.5
    assert result.validation["validation_loss"] == min(e["validation_loss"] for e in seen.epochs)
    assert not policy.training


def test_micro_batches_change_nothing() -> None:
    whole, _, _, policy = _run(epochs=2)
    pieces, _, _, other = _run(epochs=2, token_budget=18)
    for a, b in zip(policy.parameters(), other.parameters()):
        assert torch.allclose(a, b, atol=1e-5)
    assert whole.validation["validation_loss"] == pytest.approx(pieces.validation["validation_loss"], abs=1e-5)


def test_patience_stops_and_the_best_epoch_is_kept() -> None:
    result, seen, kept, _ = _run(scores=[0.1, 0.5, 0.4, 0.45, 0.6, 0.7], patience=2)
    assert result.epochs == len(seen.epochs) == 4
    assert result.best_epoch == 1 and kept == [0, 1]
    assert _run(scores=[0.1, 0.5, 0.4, 0.45, 0.6, 0.7])[0].best_epoch == 5


def test_patience_does_not_stop_before_the_rate_has_decayed() -> None:
    scores = [0.5, 0.4, 0.4, 0.4, 0.6, 0.7]
    assert _run(scores=scores, patience=1)[0].epochs == 2
    assert _run(scores=scores, patience=1, decay_epochs=4)[0].epochs == 4
    assert _run(scores=scores, patience=1, decay_epochs=5)[0].epochs == 6


def test_a_rise_within_the_noise_does_not_keep_training_going_but_is_kept() -> None:
    result, _, kept, _ = _run(scores=[0.1, 0.5, 0.505, 0.508, 0.6, 0.7], patience=2, min_rise=0.01)
    assert result.epochs == 4
    assert result.best_epoch == 3 and kept == [0, 1, 2, 3]


def test_early_epochs_may_go_without_validation_but_the_last_never_does() -> None:
    _, seen, kept, _ = _run(epochs=4, validate_from=3)
    assert ["validation_loss" in epoch for epoch in seen.epochs] == [False, False, True, True]
    assert kept and all(epoch >= 2 for epoch in kept)
    assert _run(epochs=2, validate_from=9)[0].best_epoch == 1


def test_the_rate_stays_at_its_floor_after_the_decay_epochs() -> None:
    _, seen, _, _ = _run(decay_epochs=2, final_lr_share=0.1)
    rates = [step["learning_rate"] for step in seen.steps]
    assert max(rates) == pytest.approx(1e-2, rel=0.2)
    assert rates[6:] == pytest.approx([1e-3] * 12)


def test_steps_that_are_never_finite_end_the_stage() -> None:
    policy = TinyPolicy()
    with torch.no_grad():
        policy.mlp[0].weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="5 steps in a row"):
        _run(policy=policy)
