"""What can be said without a simulation: how many groups a role makes, and the best ratio of generators to learners.

Owns: the formulas of docs/scaling.md. They know no waiting, no stragglers and no driver.
"""

from __future__ import annotations

from medtvt_rl.config import Config
from medtvt_rl.simulation.timings import Timings


def generator_group_s(timings: Timings, group_size: int, running: float) -> float:
    """Seconds of one generator for a group while so many completions run together."""
    running, length = max(1, int(running)), timings.mean_length
    context = running * (timings.prompt_tokens + length / 2)
    tokens_s = group_size / running * length * timings.decode_step_s(running, context)
    return timings.prefill_s(group_size, timings.prompt_tokens) + tokens_s


def learner_group_s(timings: Timings, group_size: int, updates: int) -> float:
    """Seconds of one learner rank for a group."""
    tokens = timings.prompt_tokens + group_size * timings.mean_length
    return timings.learner_token_s * timings.learner_ranks * tokens * updates


def best_ratio(config: Config, timings: Timings, groups_per_rank: int, ranks: int = 1) -> float:
    """Generators for each learner rank at which neither waits: seconds that a generator needs for the groups of a rank,
    and for what a publication costs it, over those of the rank's step."""
    grpo = config.grpo
    learner_s = groups_per_rank * learner_group_s(timings, grpo.group_size, grpo.updates_per_batch)
    learner_s += timings.learner_step_s + timings.export_s + timings.score_s + timings.load_s
    ratio = 1.0
    for _ in range(20):  # the fewer generators, the more each has to do at a time
        share = groups_per_rank * ranks * (grpo.max_staleness + 1) * grpo.group_size / max(1.0, ratio * ranks)
        running = min(float(config.rollout.engine.max_num_seqs), max(float(grpo.group_size), share))
        context = running * (timings.prompt_tokens / grpo.group_size + timings.mean_length / 2)
        lost_s = timings.load_s + timings.recompute_token_s * context
        available_s = max(learner_s - lost_s, 1e-9)
        ratio = 0.5 * ratio + 0.5 * groups_per_rank * generator_group_s(timings, grpo.group_size, running) / available_s
    return ratio
