"""The Jaccard reward: how much of the answer set is right.

Owns: the comparison of the two sets. Does not own: parsing (answer.py), the weight of the reward (config.py).
"""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

from medtvt_rl.rewards.answer import normalised_names, parse_answer, split_names, tagged_answer


def jaccard_reward(
    completion: str, ground_truth: str, matching: Literal["normalised", "exact"] = "normalised"
) -> float:
    """Size of the intersection over size of the union of the answered and the true names, 0 to 1.

    normalised: the completion must keep the format, or earns 0; names are compared by `answer.normalise`. Two empty
        sets agree: 1.
    exact: as the published implementation (https://arxiv.org/abs/2506.18512): the first answer tag counts, whatever
        surrounds it; names must be equal to the letter, and an empty set on either side earns 0.

    Args:
        ground_truth: "A; B", bare or within answer tags.

    Raises:
        ValueError: an unknown `matching`.
    """
    tagged = tagged_answer(ground_truth)
    truth = split_names(ground_truth if tagged is None else tagged)
    if matching == "exact":
        answered = set(split_names(tagged_answer(completion) or ""))
        return _jaccard(answered, set(truth), empty=0.0)
    if matching != "normalised":
        raise ValueError(f"jaccard reward, matching: {matching!r}, expected 'normalised' or 'exact'")
    parsed = parse_answer(completion)
    return 0.0 if parsed is None else _jaccard(parsed.normalised, normalised_names(truth), empty=1.0)


def _jaccard(answered: Set[str], truth: Set[str], empty: float) -> float:
    union = answered | truth
    return len(answered & truth) / len(union) if union else empty
