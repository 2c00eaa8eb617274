"""What is logged of one step beside the learner's own metrics: rewards, lengths, staleness, and who was busy.

Owns: names and arithmetic. Does not own: the learner's metrics (algorithm/losses.py), or where they go (reporter.py).
Pure functions of headers and counters; the loop's own time is told by step_clock.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from medtvt_rl.algorithm.advantages import has_signal
from medtvt_rl.rollout.balance import Share
from pipelines.grpo_roles import FinishedGroup, TrainingGroup

GENERATORS_SHOWN = 16
COUNTERS = (
    *("tokens_generated", "prompt_tokens", "prompt_tokens_shared"),
    *("busy_s", "idle_s", "num_updates", "update_s", "load_s"),
)


def rollout_metrics(groups: Sequence[TrainingGroup], version: int) -> dict[str, float]:
    """Rewards by component, lengths, staleness and zero-variance groups (all advantages 0) of one step.

    For each component NAME: reward/NAME (mean), reward_deviation/NAME, reward_equal_groups/NAME (share of groups in
    which all completions have the same). staleness/groups_at_K counts the groups whose oldest token is K steps old.
    """
    headers = [g.group.header for g in groups]
    rewards = [g.group.rewards for g in groups]
    totals = [r.total for r in rewards]
    lengths = np.concatenate([h.lengths for h in headers])
    staleness = [version - h.oldest_version for h in headers]
    metrics = {
        "reward/total": float(np.concatenate(totals).mean()),
        "reward/deviation": float(np.concatenate(totals).std()),
        "reward/failed": float(sum(r.failed.sum() for r in rewards)),
        "groups/trained": float(len(groups)),
        "groups/zero_variance_share": float(np.mean([not np.any(g.advantages) for g in groups])),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/empty": float((lengths == 0).sum()),
        "length/one_token": float((lengths == 1).sum()),
        "length/cut_share": float(sum(h.num_cut for h in headers) / len(lengths)),
        "staleness/mean": float(np.mean(staleness)),
        "staleness/max": float(max(staleness)),
        "seconds/generate_group": float(np.mean([h.generate_s for h in headers])),
    }
    metrics |= {f"staleness/groups_at_{age}": float(count) for age, count in sorted(Counter(staleness).items())}
    for name in rewards[0].components:
        values = [r.components[name] for r in rewards]
        metrics[f"reward/{name}"] = float(np.concatenate(values).mean())
        metrics[f"reward_deviation/{name}"] = float(np.concatenate(values).std())
        metrics[f"reward_equal_groups/{name}"] = _equal_share(values)
    return metrics


def _equal_share(values: Sequence[np.ndarray]) -> float:
    return float(np.mean([not has_signal(each) for each in values]))


def role_metrics(
    before: Sequence[dict[str, float]],
    after: Sequence[dict[str, float]],
    groups: Sequence[TrainingGroup],
    step: Mapping[str, float],
) -> dict[str, float]:
    """Busy seconds and tokens per second by role over one step, whose own metrics so far are `step`.

    The learner's tokens are those of prompts and completions, the others' those of completions. Rollout figures are
    differences of the engines' counters, per engine; scorers and reference are summed over the groups of the step.
    `sync_blocked` is what a weight update costs an engine beyond loading. An engine started anew meanwhile counts from
    its start.
    """
    metrics = {}
    if "tokens" in step:
        metrics["tokens_per_s/learner"] = step["tokens"] * step["updates"] / max(step["seconds/train"], 1e-9)
    if after:
        gained = {name: _gain(before, after, name) for name in COUNTERS}
        metrics["seconds/rollout_busy"] = gained["busy_s"] / len(after)
        metrics["seconds/rollout_idle"] = gained["idle_s"] / len(after)
        metrics["seconds/sync_load"] = gained["load_s"] / max(gained["num_updates"], 1.0)
        metrics["seconds/sync_blocked"] = (gained["update_s"] - gained["load_s"]) / max(gained["num_updates"], 1.0)
        metrics["rollout/prompt_shared_share"] = gained["prompt_tokens_shared"] / max(gained["prompt_tokens"], 1.0)
        metrics["tokens_per_s/rollout"] = gained["tokens_generated"] / max(step["seconds/step"], 1e-9)
    finished = [g.group for g in groups]
    metrics["seconds/reward_busy"] = sum(g.rewards.seconds for g in finished)
    metrics["tokens_per_s/reward"] = _tokens(finished) / max(metrics["seconds/reward_busy"], 1e-9)
    headers = [g.reference_header for g in finished if g.reference_header is not None]
    if headers:
        busy_s = sum(header.seconds for header in headers)
        metrics["seconds/reference_busy"] = busy_s
        metrics["tokens_per_s/reference"] = _tokens(finished) / max(busy_s, 1e-9)
    return metrics


def _tokens(groups: Sequence[FinishedGroup]) -> float:
    return float(sum(sum(group.header.lengths) for group in groups))


def _gain(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]], name: str) -> float:
    """Over all engines that are there now; those that were there before are known by their number."""
    earlier = {engine.get("generator", place): engine[name] for place, engine in enumerate(before)}
    total = 0.0
    for place, engine in enumerate(after):
        gained = engine[name] - earlier.get(engine.get("generator", place), 0.0)
        total += gained if gained >= 0 else engine[name]
    return total


def generator_metrics(shares: Sequence[Share]) -> dict[str, float]:
    """`generator_share/INDEX` of the tokens of the run so far, and `generator_tokens_per_s/INDEX`, a moving average;
    for the first GENERATORS_SHOWN, where there are several."""
    if len(shares) < 2:
        return {}
    shown = shares[:GENERATORS_SHOWN]
    metrics = {f"generator_share/{one.index}": one.share for one in shown}
    return metrics | {f"generator_tokens_per_s/{one.index}": one.tokens_per_s or 0.0 for one in shown}
