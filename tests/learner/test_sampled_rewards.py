"""Answers that validation samples end where the model's answers end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from medtvt_rl.learner.validation import SampledRewards
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.types import Prompt

END, END_OF_TURN, PAD = 5, 6, 0


class Numbers:
    """A tokenizer of numbers."""

    eos_token_id, pad_token_id = END, PAD

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class Policy(nn.Module):
    """Answers the same, whatever it is asked, and keeps how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.generation_config = GenerationConfig(eos_token_id=[END, END_OF_TURN])
        self.asked: dict[str, Any] = {}

    def generate(self, input_ids: Tensor, **given: Any) -> Tensor:
        self.asked = given
        answers = torch.tensor([[7, END, 9, END_OF_TURN], [7, 7, END_OF_TURN, PAD], [7, 7, 7, 7]])
        return torch.cat([input_ids.repeat(3, 1), answers], dim=1)


class Engine:
    """One rank."""

    rank, world_size, device, dtype = 0, 1, torch.device("cpu"), torch.float32

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def gathered(self, parameters: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def all_reduce(self, values: Tensor, op: str) -> Tensor:
        return values


def test_either_of_the_models_end_tokens_ends_an_answer() -> None:
    policy = Policy()
    engine: Any = Engine(policy)
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 2], dtype=np.int32), item_id=None, ground_truth="")
    rewards = {"format": RewardConfig(function="medtvt_rl.rewards.format:format_reward")}
    means = SampledRewards(engine, None, [prompt], Numbers(), rewards, SamplingConfig(), num_samples=3, seed=0)()
    assert policy.asked["eos_token_id"] == [END, END_OF_TURN]
    assert means["length"] == (2 + 3 + 4) / 3 and means["failed"] == 0
