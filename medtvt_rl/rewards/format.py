"""The format reward, as published.

Owns: the test of the overall form. Does not own: what lies between the tags; evaluation's stricter reading is
`answer.parse_answer`.
"""

from __future__ import annotations

import re

_MIDDLE = re.compile(r"</think>\s*<answer>")


def format_reward(completion: str, ground_truth: str = "") -> float:
    """1 if the completion is a think part and then an answer part, up to its very end; else 0.

    As in https://arxiv.org/abs/2506.18512: white space may stand before and between the parts, not after them, and
    the parts may hold further tags. The ground truth is not looked at.
    """
    text, end = completion.lstrip(), "</answer>"
    if not text.startswith("<think>") or not text.endswith(end):
        return 0.0
    middle = _MIDDLE.search(text, len("<think>"))
    return 1.0 if middle is not None and middle.end() <= len(text) - len(end) else 0.0
