"""From the rewards of one group to its advantages.

Owns: the baseline and the scale of the three kinds, and what a kind of one's own may return. Does not own: rewards
(rewards/), or the loss that the advantages weigh.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtvt_rl.algorithm.config import ADVANTAGES
from medtvt_rl.dotted import resolve

STD_EPSILON = 1e-4
# Rewards closer than this are equal: dividing rounding noise by the epsilon above would turn it into a gradient.
EQUAL_TOLERANCE = 1e-6


def has_signal(rewards: ArrayLike) -> bool:
    """Whether the rewards of a group differ; a group whose rewards are equal has no gradient, and is worth counting."""
    values = np.asarray(rewards, dtype=np.float64)
    return bool(values.size > 1 and np.ptp(values) > EQUAL_TOLERANCE)


def group_advantages(rewards: ArrayLike, kind: str) -> NDArray[np.float32]:
    """Advantages of the G completions of one group.

    group: (r - mean) / (std + 1e-4), std with G - 1 in the denominator (GRPO, https://arxiv.org/abs/2402.03300).
    mean_only: r - mean (Dr. GRPO, https://arxiv.org/abs/2503.20783).
    rloo: r - mean of the others (https://arxiv.org/abs/2402.14740).
    module:f: what f makes of the rewards [G] float64.

    Args:
        rewards: [G] total rewards, finite, G >= 2.

    Returns:
        [G] float32; exactly 0 everywhere where the rewards do not differ.

    Raises:
        ValueError: not a vector of at least two finite values, an unknown kind, or one that returns anything else than
            G finite values.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"rewards: shape {values.shape}, expected (G,), G >= 2; a group of one has no baseline, raise group_size"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"rewards: {values.tolist()}, expected finite values, as the scorer returns")
    if kind not in ADVANTAGES and ":" not in kind:
        raise ValueError(f"advantage: {kind!r}, expected one of {', '.join(ADVANTAGES)}, or 'package.module:function'")
    if not has_signal(values):
        return np.zeros(len(values), dtype=np.float32)
    if ":" in kind:
        return _own(values, kind)
    centred = values - values.mean()
    if kind == "group":
        centred /= values.std(ddof=1) + STD_EPSILON
    elif kind == "rloo":
        # r_i minus the mean of the others equals the centred reward times G / (G - 1).
        centred *= len(values) / (len(values) - 1)
    return centred.astype(np.float32)


def _own(rewards: NDArray[np.float64], path: str) -> NDArray[np.float32]:
    found = np.asarray(resolve(path, "grpo.advantage")(rewards.copy()), dtype=np.float32)
    if found.shape != rewards.shape or not np.isfinite(found).all():
        raise ValueError(f"grpo.advantage: {path} made {found} of {rewards}, expected {len(rewards)} finite values")
    return found
