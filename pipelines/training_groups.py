"""From a finished group to one that can be trained on.

Owns: what shapes the reward before the advantages. Does not own: the arithmetic (medtvt_rl/algorithm).
"""

from __future__ import annotations

from medtvt_rl.algorithm.advantages import group_advantages
from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.algorithm.shaping import overlong_penalty
from pipelines.grpo_roles import FinishedGroup, TrainingGroup


def with_advantages(group: FinishedGroup, config: GrpoConfig, max_new_tokens: int) -> TrainingGroup:
    """A group with the advantages of its completions."""
    kl, overlong = config.loss.kl, config.overlong
    rewards = group.rewards.total
    if overlong.weight:
        penalty = overlong_penalty(group.header.lengths, max_new_tokens, overlong.buffer_tokens)
        rewards = rewards + overlong.weight * penalty
    if group.reference_header is not None and kl.placement == "reward":
        rewards = rewards - kl.coefficient * group.reference_header.kl
    return TrainingGroup(group=group, advantages=group_advantages(rewards, config.advantage))
