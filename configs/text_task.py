"""Adding two numbers: a plain text task, named by dotted paths in text_task.yaml. Docs: docs/reuse.md.

The question is "07+58", its answer the sum from the last digit to the first, as one adds on paper: "560".
"""

import random
from typing import Any

import numpy as np

from medtvt_rl.types import Example, Prompt

SUMS = [(a, b) for a in range(100) for b in range(100)]
random.Random(0).shuffle(SUMS)
SPLITS = {"train": SUMS[:8000], "validation": SUMS[8000:8200], "test": SUMS[8200:8500]}
TAUGHT = 1000  # sums whose answers SFT is shown; for the others there is a reward only


def prompts(config: Any, tokenizer: Any, split: str) -> list[Prompt]:
    """What GRPO trains on and evaluation asks."""
    return [_prompt(tokenizer, a, b) for a, b in SPLITS[split]]


def examples(config: Any, tokenizer: Any, split: str) -> list[Example]:
    """What SFT learns from."""
    return [Example(prompt=each, answer=each.ground_truth) for each in prompts(config, tokenizer, split)[:TAUGHT]]


def right(completion: str, ground_truth: str) -> float:
    """The reward: 1 for the right sum, 0 for anything else."""
    return float(completion == ground_truth)


def _prompt(tokenizer: Any, a: int, b: int) -> Prompt:
    messages = [{"role": "user", "content": f"{a:02}+{b:02}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    return Prompt(prompt_id=f"{a}+{b}", token_ids=ids, item_id=None, ground_truth=f"{a + b:03}"[::-1])
