"""A step that is not finite changes nothing and names its groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import STEEP, PlainEngine, SteepPolicy, TinyItems, make_sequences

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.config import Config
from medtvt_rl.learner.culprits import CAUSES, agree, describe, groups_of
from medtvt_rl.learner.grpo_learner import GrpoLearner
from medtvt_rl.types import LearnerStep, TrainingSequence

torch.set_num_threads(1)
VERSION, NUM_GROUPS = 3, 5
Break = Callable[[TrainingSequence], TrainingSequence]


class SpoiltItems(TinyItems):
    """Items, one of them NaN."""

    def get(self, item_id: str) -> dict[str, np.ndarray[Any, Any]]:
        item = super().get(item_id)
        return {"x": item["x"] * np.nan} if item_id == "spoilt" else item


def _learner(token_budget: int = 40, num_updates: int = 1, kl: float = 0.1) -> GrpoLearner:
    config = Config()
    config.learner.token_budget = token_budget
    config.grpo.updates_per_batch = num_updates
    config.grpo.loss.kl.coefficient = kl
    return GrpoLearner(PlainEngine(SteepPolicy()), SpoiltItems(), config)


def _step(learner: GrpoLearner, sequences: list[TrainingSequence], learning_rate: float = 1e-2) -> LearnerStep:
    tokens = sum(len(s.completion.token_ids) for s in sequences)
    denominators = Denominators(num_sequences=len(sequences), num_tokens=tokens, max_new_tokens=16)
    return learner.train_step(sequences, denominators, learning_rate, VERSION)


def _weights(learner: GrpoLearner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.engine.policy.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _advantage(value: float) -> Break:
    return lambda sequence: dataclasses.replace(sequence, advantage=value)


def _behaviour(value: float) -> Break:
    def change(sequence: TrainingSequence) -> TrainingSequence:
        logprobs = sequence.completion.behaviour_logprobs.copy()
        logprobs[-1] = value
        return dataclasses.replace(
            sequence, completion=dataclasses.replace(sequence.completion, behaviour_logprobs=logprobs)
        )

    return change


def _reference(sequence: TrainingSequence) -> TrainingSequence:
    assert sequence.reference_logprobs is not None
    return dataclasses.replace(sequence, reference_logprobs=sequence.reference_logprobs * np.float32(np.nan))


def _spoilt(sequence: TrainingSequence) -> TrainingSequence:
    return dataclasses.replace(sequence, prompt=dataclasses.replace(sequence.prompt, item_id="spoilt"))


def _steep(sequence: TrainingSequence) -> TrainingSequence:
    token_ids = sequence.prompt.token_ids.copy()
    token_ids[0] = STEEP
    return dataclasses.replace(sequence, prompt=dataclasses.replace(sequence.prompt, token_ids=token_ids))


@pytest.mark.parametrize("token_budget", [20, 10_000])
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (_advantage(math.nan), "advantage"),
        (_advantage(-math.inf), "advantage"),
        (_behaviour(math.nan), "behaviour log-probs"),
        (_behaviour(-math.inf), "behaviour log-probs"),
        (_reference, "reference log-probs"),
        (_spoilt, "policy log-probs"),
        (_advantage(-3e38), "loss"),
        (_steep, "gradient"),
    ],
)
def test_the_group_is_named_and_the_next_step_knows_nothing_of_it(change: Break, cause: str, token_budget: int) -> None:
    good = make_sequences(2 * NUM_GROUPS)
    good[7] = _behaviour(-30.0)(good[7])
    bad = [*good[:7], change(good[7]), *good[8:]]
    learner, other = _learner(token_budget), _learner(token_budget)
    _step(learner, good)
    before = _weights(learner)
    step = _step(learner, bad)
    assert step.culprits == (3,) and step.skipped == f"not finite: {cause} of group 3"
    assert step.metrics["skipped"] == 1.0 and step.metrics["updates"] == 0.0
    assert all(math.isfinite(step.metrics[name]) for name in ("importance_ratio_p99", "importance_ratio_max"))
    assert _same(before, _weights(learner))
    again = _step(learner, good)
    _step(other, good)
    straight = _step(other, good)
    assert again.skipped is None and again.culprits == ()
    assert {**again.metrics, "seconds": 0.0} == {**straight.metrics, "seconds": 0.0}
    assert _same(_weights(learner), _weights(other))


def test_every_cause_of_a_step_is_told() -> None:
    bad = make_sequences(2 * NUM_GROUPS)
    bad[0], bad[3], bad[9] = _advantage(math.nan)(bad[0]), _behaviour(math.inf)(bad[3]), _advantage(math.inf)(bad[9])
    step = _step(_learner(), bad)
    assert step.culprits == (0, 1, 4)
    assert step.skipped == "not finite: advantage of groups 0, 4; behaviour log-probs of group 1"


def test_without_the_culprits_the_step_is_taken() -> None:
    sequences = make_sequences(2 * NUM_GROUPS)
    sequences[2], sequences[9] = _steep(sequences[2]), _steep(sequences[9])
    learner = _learner()
    step = _step(learner, sequences)
    assert step.culprits == (1, 4)
    assert _step(learner, [s for s in sequences if s.group_id not in step.culprits]).skipped is None


def test_a_completion_without_tokens_is_no_culprit() -> None:
    sequences = make_sequences(4)
    completion = dataclasses.replace(
        sequences[0].completion,
        token_ids=np.zeros(0, dtype=np.int32),
        behaviour_logprobs=np.zeros(0, dtype=np.float32),
        policy_versions=np.zeros(0, dtype=np.int32),
    )
    sequences[0] = dataclasses.replace(
        sequences[0], completion=completion, advantage=math.nan, reference_logprobs=np.zeros(0, dtype=np.float32)
    )
    for token_budget in (20, 1000):
        assert _step(_learner(token_budget), sequences).skipped is None


def test_where_each_group_alone_is_finite_every_group_is_named() -> None:
    twin = make_sequences(2)
    twins = [dataclasses.replace(s, group_id=group_id) for group_id in (4, 2, 7, 5) for s in twin]
    norm = _step(_learner(kl=0.0), twins, 0.0).metrics["gradient_norm"]
    # The norm of all four is four times that of one; its square alone is beyond float32.
    scale = 4e19 / norm
    large = [dataclasses.replace(s, advantage=s.advantage * scale) for s in twins]
    step = _step(_learner(kl=0.0), large)
    assert step.culprits == (2, 4, 5, 7)
    assert step.skipped is not None and step.skipped.endswith("of each group alone is finite, so every group is named")


def test_a_later_update_that_is_not_finite_says_how_many_were_taken() -> None:
    step = _step(_learner(num_updates=3), make_sequences(4), learning_rate=1e30)
    assert step.culprits == (0, 1) and step.skipped is not None
    assert step.metrics["updates"] == 1.0 and step.metrics["skipped"] == 0.0 and not step.changed_nothing


def test_later_updates_find_the_gradient_of_a_group_too() -> None:
    sequences = make_sequences(2 * NUM_GROUPS)
    sequences[4] = _steep(sequences[4])
    for token_budget in (20, 10_000):
        assert _step(_learner(token_budget, num_updates=2), sequences).culprits == (2,)


class RankOfTwo(PlainEngine):
    """A rank beside one that found `theirs`, told in the order of the collectives."""

    def __init__(self, theirs: list[torch.Tensor]) -> None:
        super().__init__(SteepPolicy())
        self.world_size, self._theirs = 2, theirs

    def all_reduce(self, values: torch.Tensor, op: str) -> torch.Tensor:
        other = self._theirs.pop(0)
        return torch.maximum(values, other) if op == "max" else values + other


def test_ranks_agree_though_they_found_unequally_much() -> None:
    theirs = torch.tensor([[[0, 0], [0, 0]], [[CAUSES.index("loss") + 1, 5], [CAUSES.index("loss") + 1, 0]]])
    engine = RankOfTwo([torch.tensor([2]), theirs])
    found = agree(engine, {("advantage", 0)})
    assert found == [("advantage", 0), ("loss", 0), ("loss", 5)]
    assert groups_of(found) == (0, 5)
    assert describe(found) == "not finite: advantage of group 0; loss of groups 0, 5"
