"""The scorer: components, weights, and functions that fail."""

import math

import numpy as np
import pytest

from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rewards.scorer import Scorer

GOOD = "<think> a </think><answer> Sepsis </answer>"
HALF = "<think> a </think><answer> Sepsis; Gout </answer>"


def length_share(completion: str, ground_truth: str, longest: int) -> float:
    return len(completion) / longest


def picky(completion: str, ground_truth: str) -> float:
    return {"nan": math.nan, "big": 7.0, "text": "no number", "none": None}[completion]  # type: ignore[return-value]


def within(completion: str, ground_truth: str, *, evidence: dict[str, int] | None, factor: float = 1.0) -> float:
    return factor * evidence[completion]  # type: ignore[index]


def collects(completion: str, ground_truth: str, **options: int) -> float:
    return float(len(options))


def misnamed(completion: str, evidence: str) -> float:
    return 0.0


def config(function: str, **changes) -> RewardConfig:
    return RewardConfig(function=function, **changes)


JACCARD = config("medtvt_rl.rewards.jaccard:jaccard_reward")
FORMAT = config("medtvt_rl.rewards.format:format_reward", weight=0.5)


def test_components_and_weighted_total():
    rewards = Scorer({"jaccard": JACCARD, "format": FORMAT}).score([GOOD, HALF, "Sepsis"], "Sepsis")
    np.testing.assert_array_equal(rewards.components["jaccard"], np.array([1, 0.5, 0], np.float32))
    np.testing.assert_array_equal(rewards.components["format"], np.array([1, 1, 0], np.float32))
    np.testing.assert_array_equal(rewards.total, np.array([1.5, 1.0, 0], np.float32))
    assert rewards.total.dtype == np.float32
    assert not rewards.failed.any()
    assert rewards.reasons == (None, None, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("unforeseen", "picky: KeyError: 'unforeseen'"),
        ("nan", "picky: returned nan, outside its declared range [-1.0, 1.0]"),
        ("big", "picky: returned 7.0, outside its declared range [-1.0, 1.0]"),
        ("text", "picky: ValueError"),
        ("none", "picky: TypeError"),
    ],
)
def test_a_failing_function_marks_its_completion_and_no_other(text, reason):
    configs = {"picky": config(f"{__name__}:picky", low=-1.0, weight=2.0), "format": FORMAT}
    rewards = Scorer(configs).score([text], "Sepsis")
    assert rewards.failed.tolist() == [True]
    assert rewards.reasons[0] is not None and rewards.reasons[0].startswith(reason)
    assert rewards.total.tolist() == [-2.0]


def test_a_failed_completion_gets_the_worst_of_every_component():
    configs = {
        "length": config(f"{__name__}:length_share", weight=-1.0, high=3.0, options={"longest": 40}),
        "jaccard": JACCARD,
    }
    rewards = Scorer(configs).score([GOOD, GOOD * 5], "Sepsis")
    assert rewards.failed.tolist() == [False, True]
    assert rewards.components["length"].tolist() == [pytest.approx(len(GOOD) / 40), 3.0]
    assert rewards.components["jaccard"].tolist() == [1.0, 0.0]
    assert rewards.total[1] == -3.0


def test_evidence_goes_to_the_functions_that_ask_for_it_and_to_no_other():
    configs = {
        "within": config(f"{__name__}:within", options={"factor": 0.5}),
        "collects": config(f"{__name__}:collects"),
        "format": FORMAT,
    }
    rewards = Scorer(configs).score(["a", "b", "c"], "", {"a": 1, "b": 0})
    assert rewards.components["within"].tolist() == [0.5, 0.0, 0.0]
    assert rewards.components["collects"].tolist() == [0.0, 0.0, 0.0]
    assert rewards.failed.tolist() == [False, False, True]
    assert rewards.reasons[2] == "within: KeyError: 'c'"


def test_without_evidence_a_function_that_asks_for_it_gets_none():
    rewards = Scorer({"within": config(f"{__name__}:within")}).score(["a"], "")
    assert rewards.reasons[0] is not None and "'NoneType' object is not subscriptable" in rewards.reasons[0]


def test_no_completions():
    assert Scorer({"format": FORMAT}).score([], "").total.shape == (0,)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({}, "no component"),
        ({"a": config("medtvt_rl.rewards.format:nothing")}, r"rewards\.a\.function.*nothing"),
        ({"a": config("medtvt_rl.rewards.format:format_reward", low=1.0)}, r"rewards\.a\.low"),
        ({"a": config("medtvt_rl.rewards.format:format_reward", weight=math.inf)}, "weight inf"),
        ({"a": config("medtvt_rl.rewards.jaccard:jaccard_reward", options={"mode": 1})}, r"rewards\.a\.options.*mode"),
        ({"a": config(f"{__name__}:length_share")}, "longest"),
        ({"a": config(f"{__name__}:within", options={"facter": 1})}, r"rewards\.a\.options.*facter"),
        ({"a": config(f"{__name__}:within", options={"evidence": 1})}, r"rewards\.a\.options.*evidence"),
        ({"a": config(f"{__name__}:misnamed")}, r"rewards\.a\.options.*evidence"),
    ],
)
def test_settings_that_cannot_work_are_found_at_the_start(configs, message):
    with pytest.raises(ValueError, match=message):
        Scorer(configs)
