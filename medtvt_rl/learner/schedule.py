"""Learning rates as pure functions of the step. Owns nothing else; the engine is told the rate at each step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total_steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """The rate of step `step` (0-based): linear rise over `warmup_steps`, then a half cosine down to `final_share *
    peak`.
    """
    fall = 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps, warmup_steps)))
    return peak * _rise(step, warmup_steps) * (final_share + (1 - final_share) * fall)


def linear_decay(step: int, total_steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """The rate of step `step` (0-based): a line from `peak` down to `final_share * peak` at the last step, and a linear
    rise over the first `warmup_steps` on top.
    """
    fall = (1 - final_share) * _progress(step, total_steps, 0)
    return peak * _rise(step, warmup_steps) * (1 - fall)


def _rise(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """0 until the end of the warm-up, 1 from the last step on."""
    length = max(total_steps - 1 - warmup_steps, 1)
    return min(1.0, max(0.0, (step - warmup_steps) / length))
