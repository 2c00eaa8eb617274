"""The format reward, as published.

Owns: the test of the overall form. Does not own: what lies between the tags; evaluation's stricter reading is
`answer.parse_answer`.
"""

from __future__ import annotations

import re

_OPENING = re.compile(r"\s*<think>")
_BETWEEN = re.compile(r"</think>\s*<answer>")
_CLOSING = "</answer>"


def format_reward(completion: str, ground_truth: str = "") -> float:
    """1 if the completion is a think part and then an answer part, up to its very end; else 0.

    As in https://arxiv.org/abs/2506.18512: white space may stand before and between the parts, not after them, and
    the parts may hold further tags. The ground truth is not looked at.
    """
    opening = _OPENING.match(completion)
    between = _BETWEEN.search(completion, opening.end()) if opening else None
    return 1.0 if between and completion.endswith(_CLOSING, between.end()) else 0.0
