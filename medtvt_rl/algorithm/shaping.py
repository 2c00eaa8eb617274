"""What is taken off the reward for the form of a completion, whatever it says.

Owns: the penalty for length. Does not own: its weight in the reward (config.py), or the rewards themselves (rewards/).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def overlong_penalty(lengths: ArrayLike, max_new_tokens: int, buffer_tokens: int) -> NDArray[np.float32]:
    """Soft overlong punishment (DAPO, https://arxiv.org/abs/2503.14476, equation 13).

    0 up to max_new_tokens - buffer_tokens, then linear down to -1 at max_new_tokens: a completion that was cut at the
    limit gets -1, also where its answer is right.

    Args:
        lengths: [G] tokens of each completion, 0 or more.
        max_new_tokens: the length at which a completion is cut.
        buffer_tokens: the last tokens before it, over which the penalty grows.

    Returns:
        [G] float32 in [-1, 0].

    Raises:
        ValueError: no vector of lengths, a negative one, or a buffer that is not within the limit.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    if tokens.ndim != 1 or (tokens < 0).any():
        raise ValueError(f"lengths: {tokens.tolist()}, expected (G,) token counts, 0 or more")
    if not 0 < buffer_tokens < max_new_tokens:
        raise ValueError(
            f"overlong.buffer_tokens: {buffer_tokens}, expected 1 or more, and fewer than max_new_tokens, "
            f"{max_new_tokens}"
        )
    excess = tokens - (max_new_tokens - buffer_tokens)
    # Subtracted from 0.0, so that a short completion gets 0 and not -0.
    return (0.0 - np.clip(excess / buffer_tokens, 0.0, 1.0)).astype(np.float32)
