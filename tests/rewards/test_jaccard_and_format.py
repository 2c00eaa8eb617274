"""The two published rewards against the reference's values, and the normalised mode by hand."""

import json
from pathlib import Path

import pytest

from medtvt_rl.rewards.format import format_reward
from medtvt_rl.rewards.jaccard import jaccard_reward

CASES = json.loads((Path(__file__).parent / "reference_rewards.json").read_text())


def test_every_reference_value():
    assert len(CASES) == 204
    for case in CASES:
        completion, truth = case["completion"], case["ground_truth"]
        assert jaccard_reward(completion, truth, matching="exact") == case["jaccard"], case
        assert format_reward(completion, truth) == case["format"], case


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
