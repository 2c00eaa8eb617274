"""Adding four digits, "3+4+8+2": a plain text task, named by dotted paths in text_task.yaml. Docs: docs/reuse.md."""

import random
from itertools import product
from typing import Any

import numpy as np

from medtvt_rl.types import Example, Prompt

SUMS = list(product(range(10), repeat=4))
random.Random(0).shuffle(SUMS)
SPLITS = {"train": SUMS[:8000], "validation": SUMS[8000:8200], "test": SUMS[8200:8500]}
TAUGHT = 4000  # sums that SFT is shown; for the others there is a reward only


def prompts(config: Any, tokenizer: Any, split: str) -> list[Prompt]:
    """What GRPO trains on and evaluation asks."""
    return [_prompt(tokenizer, digits) for digits in SPLITS[split]]


def examples(config: Any, tokenizer: Any, split: str) -> list[Example]:
    """What SFT learns from: a teacher who answers every second question with "??", so that the reward has its say."""
    shown = prompts(config, tokenizer, split)[:TAUGHT]
    return [Example(prompt=each, answer="??" if i % 2 else each.ground_truth) for i, each in enumerate(shown)]


def right(completion: str, ground_truth: str) -> float:
    """The reward: 1 for the right sum, 0 for anything else."""
    return float(completion == ground_truth)


def _prompt(tokenizer: Any, digits: tuple[int, ...]) -> Prompt:
    question = "+".join(map(str, digits))
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    return Prompt(prompt_id=question, token_ids=ids, item_id=None, ground_truth=f"{sum(digits):02}")
