"""From measured seconds to the coefficients of a role's time: non-negative least squares of relative errors.

Owns: what of an observation counts how often. Does not own: measuring (pipelines/bench.py), using (timings.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Groups that an engine was asked for at once, and had done after so many seconds.

    Attributes:
        lengths: completion tokens, a row a group. prompt_tokens: of each group.
        updated_at: where new weights came meanwhile, the share of its time that had passed then; `seconds` are those
            without their load.
    """

    seconds: float
    lengths: tuple[tuple[int, ...], ...]
    prompt_tokens: tuple[int, ...]
    updated_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """Coefficients as Timings names them, and the median relative error of what they say of the observations."""

    decode_s: tuple[tuple[float, float], ...]
    context_s: float
    prefill_group_s: float
    prefill_completion_s: float
    prefill_token_s: float
    recompute_token_s: float
    error: float


def fit_engine(observations: Sequence[Generated], max_running: int) -> EngineFit:
    """The engine's times; a token of n completions takes a time that is linear between a few numbers n."""
    most = max(sum(map(len, each.lengths)) for each in observations)
    knots = sorted({1, *(number for number in (8, 32) if number < min(most, max_running)), min(most, max_running)})
    rows = [_row(each, knots) for each in observations]
    found, error = _fit(rows, [each.seconds for each in observations])
    steps = np.asarray(found[5:-1])
    # More completions never take less time, and one takes some; noise may say otherwise.
    steps[0] = steps[0] or min(steps[steps > 0], default=0.0)
    return EngineFit(
        decode_s=tuple(zip(map(float, knots), np.maximum.accumulate(steps).tolist())),
        context_s=found[3],
        prefill_group_s=found[0],
        prefill_completion_s=found[1],
        prefill_token_s=found[2],
        recompute_token_s=found[4],
        error=error,
    )


def _row(each: Generated, knots: Sequence[int]) -> list[float]:
    """Groups, completions, prompt tokens, tokens attended to, tokens computed again, tokens made at each knot, and one
    call."""
    sizes = [(length, prompt) for row, prompt in zip(each.lengths, each.prompt_tokens) for length in row]
    longest = max(length for length, _ in sizes)
    running = [sum(length > token for length, _ in sizes) for token in range(longest)]
    attended = sum(prompt * length + length * length / 2 for length, prompt in sizes)
    at_knots = np.zeros(len(knots))
    for number in running:
        at_knots += [np.interp(number, knots, unit) for unit in np.eye(len(knots))]
    again = 0.0
    if each.updated_at is not None:  # a token of many takes longer than one of few
        again = _tokens_again(each, float(np.searchsorted(np.cumsum(running), each.updated_at * sum(running))))
    return [len(each.lengths), len(sizes), sum(each.prompt_tokens), attended, again, *at_knots, 1.0]


def _tokens_again(each: Generated, made: float) -> float:
    """Tokens whose keys and values are computed once more after so many tokens, a prompt once for its completions."""
    left = [(sum(length > made for length in row), prompt) for row, prompt in zip(each.lengths, each.prompt_tokens)]
    return sum(count * made + prompt for count, prompt in left if count)


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Seconds of a call and of each unit of an amount, both not negative; and the median relative error."""
    found, error = _fit([[1.0, amount] for amount in amounts], seconds)
    return found[0], found[1], error


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[list[float], float]:
    matrix, measured = np.asarray(rows, dtype=float), np.asarray(seconds, dtype=float)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    found, _ = nnls(matrix / scale / measured[:, None], np.ones(len(measured)))
    found = found / scale
    return found.tolist(), float(np.median(np.abs(matrix @ found / measured - 1.0)))
