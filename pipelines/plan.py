"""What a run would do, before anything starts: the batch arithmetic and the placement, as text."""

from __future__ import annotations

from collections.abc import Sequence

from actors.cluster_layout import stage_bundles
from medtvt_rl.config import Config, to_yaml


def describe(config: Config, stages: Sequence[str]) -> str:
    """The resolved configuration, the batch arithmetic, and what the actors of these stages ask for."""
    return "\n".join(
        [
            "configuration",
            _indent(to_yaml(config)),
            "batch arithmetic",
            _indent(batch_arithmetic(config)),
            "placement",
            _indent(actors_of(config, stages)),
        ]
    )


def actors_of(config: Config, stages: Sequence[str]) -> str:
    """Every actor of these stages with what it asks for."""
    lines: list[str] = []
    for stage, bundles in stage_bundles(config, stages).items():
        lines += [f"{stage}:", *(f"  {bundle}" for bundle in bundles)]
    return "\n".join(lines) or "no actor"


def batch_arithmetic(config: Config) -> str:
    """Prompts, completions, tokens and micro-batches of one GRPO step, and examples of one supervised step."""
    grpo, workers = config.grpo, config.learner.num_workers
    completions = grpo.groups_per_step * grpo.group_size
    sampled = completions * config.rollout.sampling.max_new_tokens
    longest = config.rollout.engine.max_model_len
    per_micro_batch = max(1, config.learner.token_budget // longest)
    micro_batches = -(-completions // workers // per_micro_batch)
    admitted = (grpo.max_staleness + 1) * grpo.groups_per_step
    lines = [
        f"GRPO step: {grpo.groups_per_step} prompts x {grpo.group_size} completions = {completions} completions, "
        f"at most {sampled} sampled tokens",
        f"  on {workers} learner rank(s): {completions // workers} completions each, at most {micro_batches} "
        f"micro-batches of {config.learner.token_budget} tokens (fewer where completions share their prompt)",
        f"  at most {admitted} groups under way (max_staleness {grpo.max_staleness}); "
        f"{grpo.updates_per_batch} update(s) a step",
        f"  {grpo.steps} steps: {grpo.steps * grpo.groups_per_step} groups, {grpo.steps * completions} completions",
    ]
    for name, stage in (("pretrain", config.pretrain), ("sft", config.sft)):
        lines.append(
            f"{name} step: {stage.batch_size} examples = {stage.num_workers} rank(s) "
            f"x {stage.batch_size // stage.num_workers}"
        )
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
