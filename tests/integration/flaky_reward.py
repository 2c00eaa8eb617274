"""A reward function of a user's own, with a fault: it refuses every completion of even length."""

from __future__ import annotations


def flaky_reward(completion: str, ground_truth: str) -> float:
    """0 or an error, by the length of the completion."""
    if len(completion) % 2 == 0:
        raise ValueError("this one I will not score")
    return 0.0
