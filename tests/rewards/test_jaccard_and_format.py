"""The two published rewards against the reference's values, and the normalised mode by hand."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtvt_rl.config import load_config
from medtvt_rl.rewards.format import format_reward
from medtvt_rl.rewards.jaccard import jaccard_reward
from medtvt_rl.rewards.scorer import Scorer

CASES = json.loads((Path(__file__).parent / "reference_rewards.json").read_text())


def test_every_reference_value():
    assert len(CASES) == 204
    for case in CASES:
        completion, truth = case["completion"], case["ground_truth"]
        assert jaccard_reward(completion, truth, matching="exact") == case["jaccard"], case
        assert format_reward(completion, truth) == case["format"], case
        assert jaccard_reward(completion, truth, "exact") == case["jaccard"], case
        named = {"completion": completion, "ground_truth": truth}
        assert jaccard_reward(**named, matching="exact") == case["jaccard"], case
        assert format_reward(completion) == format_reward(**named) == case["format"], case
    assert {case["format"] for case in CASES} == {0.0, 1.0}
    assert len({case["jaccard"] for case in CASES}) > 5


def answer(names: str) -> str:
    return f"<think> x </think><answer> {names} </answer>"


@pytest.mark.parametrize(
    ("completion", "truth", "exact", "normalised"),
    [
        (answer("Sepsis; Pneumonia"), "Sepsis; Hypertension", 1 / 3, 1 / 3),
        (answer("sepsis; HTN"), "Sepsis; Hypertension", 0.0, 1.0),
        (answer("Sepsis; Gout"), "Sepsis", 0.5, 0.5),
        (answer(""), "", 0.0, 1.0),
        (answer("None"), "", 0.0, 1.0),
        (answer("Sepsis"), "", 0.0, 0.0),
        ("<answer>Sepsis</answer>", "Sepsis", 1.0, 0.0),
        (answer("Sepsis") + "<answer>Pneumonia</answer>", "Sepsis", 1.0, 0.0),
        (answer("Sepsis"), "<think>e</think><answer>Sepsis</answer>", 1.0, 1.0),
    ],
)
def test_both_modes(completion, truth, exact, normalised):
    assert jaccard_reward(completion, truth, matching="exact") == pytest.approx(exact)
    assert jaccard_reward(completion, truth) == pytest.approx(normalised)


def test_unknown_matching():
    with pytest.raises(ValueError, match="fuzzy"):
        jaccard_reward("", "", matching="fuzzy")


def test_training_compares_normalised_names_unless_told_otherwise():
    """As the quickstart configures it, in the class that the scorer actors run."""
    quickstart = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    texts = [answer("a. fib; Sepsis."), answer("Atrial Fibrillation; Sepsis")]
    rewards = Scorer(load_config(quickstart).rewards).score(texts, "Atrial Fibrillation; Sepsis")
    assert rewards.components["jaccard"].tolist() == [1.0, 1.0]
    exact = load_config(quickstart, ["rewards.jaccard.options.matching=exact"])
    rewards = Scorer(exact.rewards).score(texts, "Atrial Fibrillation; Sepsis")
    assert rewards.components["jaccard"].tolist() == [0.0, 1.0]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "a"])))
def test_the_format_reward_agrees_with_the_published_pattern(parts):
    text = "".join(parts)
    published = re.fullmatch(r"\s*<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL)
    assert format_reward(text) == float(published is not None)


def test_tags_without_end_cost_no_more_than_their_length():
    text = "<think>" + "</think><answer>" * 100_000
    assert format_reward(text) == 0.0 and jaccard_reward(text, "Sepsis") == 0.0
    assert jaccard_reward(text, "Sepsis", matching="exact") == 0.0
