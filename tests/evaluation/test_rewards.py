"""The mean reward of a task that names no evaluator."""

import json

import numpy as np
import pytest

from medtvt_rl.config import Config
from medtvt_rl.evaluation.diagnosis import StudyAnswers
from medtvt_rl.evaluation.rewards import RewardEvaluator
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.types import Prompt


def share(completion: str, ground_truth: str, factor: float = 1.0) -> float:
    return factor * (completion == ground_truth)


TRUTHS = {"p0": "yes", "p1": "no", "p2": "yes"}
ANSWERS = {
    "p0": StudyAnswers(sampled=("yes", "no"), greedy="yes"),
    "p1": StudyAnswers(sampled=("yes", "yes"), greedy="yes"),
    "p2": StudyAnswers(sampled=("yes", "yes"), greedy="yes"),
}


def known(completion: str, ground_truth: str, evidence: dict[str, str]) -> float:
    return float(completion == evidence["word"])


def evaluator(function: str = "share") -> RewardEvaluator:
    config = Config()
    config.evaluation.bootstrap_resamples = 200
    config.rewards = {"share": RewardConfig(function=f"{__name__}:{function}", weight=2.0)}
    ids = np.ones(3, np.int32)
    return RewardEvaluator(
        config,
        [
            Prompt(prompt_id=i, token_ids=ids, item_id=None, ground_truth=truth, evidence={"word": "no"})
            for i, truth in TRUTHS.items()
        ],
    )


def test_means_of_the_weighted_total() -> None:
    found = evaluator().evaluate(ANSWERS)
    assert found.metrics["reward"].value == pytest.approx(2 * (0.5 + 0 + 1) / 3)
    assert found.metrics["reward_greedy"].value == pytest.approx(2 * 2 / 3)
    assert 0 <= found.metrics["reward"].low <= found.metrics["reward"].value <= found.metrics["reward"].high <= 2
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["num_prompts"] == 3


def test_a_reward_may_ask_for_the_evidence_of_the_prompt() -> None:
    assert evaluator("known").evaluate(ANSWERS).metrics["reward"].value == pytest.approx(2 * (0.5 + 0 + 0) / 3)


def test_greedy_alone_has_no_sampled_mean() -> None:
    greedy = {i: StudyAnswers(sampled=(), greedy=a.greedy) for i, a in ANSWERS.items()}
    assert set(evaluator().evaluate(greedy).metrics) == {"reward_greedy"}


def test_the_gain_is_paired() -> None:
    subject = evaluator()
    before = subject.evaluate(ANSWERS)
    after = subject.evaluate({i: StudyAnswers(sampled=(t,), greedy=t) for i, t in TRUTHS.items()})
    gain = subject.paired_gain(before, after)
    assert gain.value == pytest.approx(1.0) and gain.low >= 0
    assert subject.paired_gain(before, before, metric="reward_greedy").high == 0.0
    with pytest.raises(ValueError, match="3 prompts before, 1 after"):
        subject.paired_gain(before, subject.evaluate({"p0": ANSWERS["p0"]}))


def test_answers_are_checked() -> None:
    with pytest.raises(ValueError, match="answers: none"):
        evaluator().evaluate({})
    with pytest.raises(ValueError, match=r"unknown prompts, e\.g\. study-[0-9a-f]{12}"):
        evaluator().evaluate({"p9": ANSWERS["p0"]})
