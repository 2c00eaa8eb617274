"""The GRPO stage: places the four kinds of actors, runs the loop, saves the policy.

RolloutGenerator x N --group--> RewardScorer x M, ReferencePolicy x R --> LearnerWorker x L
        ^                                                                      |
        +------------------------- weights of each step -----------------------+
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.deadline import within
from actors.learner_gang import LearnerGang
from actors.placement import Placement, grpo_roles, place, plan
from actors.reference_policy import ReferencePolicy
from actors.reward_scorer import RewardScorer
from actors.rollout_pool import RolloutPool
from medtvt_rl.config import Config
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.dotted import resolve
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import Prompt
from pipelines.grpo_loop import GrpoLoop, LoopResult, TrainingGroup
from pipelines.journal import Journal
from pipelines.reporter import Reporter
from pipelines.stages import start_model


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Trains; leaves the policy in stages/grpo/model and returns what the summary says of it."""
    return asyncio.run(_train(config, reporter))


async def _train(config: Config, reporter: Reporter) -> dict[str, Any]:
    folder = start_model(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampler = PromptSampler(load_prompts(config, tokenizer, "train"), config.run.seed)
    bundles = plan(config, grpo_roles(config))
    reporter.line(f"grpo: starting {len(bundles)} actors")
    placement = place(bundles, config.placement.timeout_s)
    try:
        reference = ReferencePool(config, placement, folder) if grpo_roles(config)["reference"] else None
        scoring = ScorerPool(config, placement, folder)
        rollouts, gang = await asyncio.gather(
            RolloutPool.start(config, placement, folder), LearnerGang.start(config, placement, folder)
        )
        reporter.start("grpo", config.grpo.steps, "step")
        with Journal(config.folder / "journal", tokenizer) as journal:

            def on_step(step: int, metrics: dict[str, float], groups: list[TrainingGroup]) -> None:
                _show(reporter, step, metrics, groups)
                journal.write(step, groups)

            loop = GrpoLoop(config.grpo, sampler, rollouts, scoring, reference, gang, on_step)
            result = await loop.run()
        await gang.save_model(config.stage_folder("grpo") / "model")
        rollouts.stop()
        gang.stop()
    finally:
        placement.release()
    return {"summary": {"grpo": summarise(result)}}


def summarise(result: LoopResult) -> dict[str, float]:
    """What the summary says of the loop; first and last reward are means over a tenth of the steps."""
    tail = max(1, len(result.rewards) // 10)
    return {
        "steps": result.steps,
        "completions": result.completions,
        "max_staleness_seen": result.max_staleness_seen,
        "logprob_max_abs_diff": result.logprob_max_abs_diff,
        "reward_first": float(np.mean(result.rewards[:tail])),
        "reward_last": float(np.mean(result.rewards[-tail:])),
    }


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, split: str) -> Sequence[Prompt]:
    """The task's prompts of a split. Raises ValueError if there are none or one does not fit the engine."""
    prompts: Sequence[Prompt] = resolve(config.task.prompts, "task.prompts")(config, tokenizer, split)
    if not prompts:
        raise ValueError(f"task.prompts {config.task.prompts} gave no prompt for the split {split!r}")
    room = config.rollout.engine.max_model_len - config.rollout.sampling.max_new_tokens
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if len(longest.token_ids) > room:
        raise ValueError(
            f"prompt {longest.prompt_id} has {len(longest.token_ids)} tokens, and rollout.engine.max_model_len - "
            f"rollout.sampling.max_new_tokens leaves {room}; raise the former"
        )
    return prompts


class ScorerPool:
    """The reward scorers, taken in turn."""

    def __init__(self, config: Config, placement: Placement, model_folder: Path) -> None:
        self._timeout_s = config.score_timeout_s
        actor: Any = RewardScorer
        self._scorers = [
            actor.options(**placement.options("reward", index)).remote(config, str(model_folder), index)
            for index in range(config.num_scorers)
        ]
        self._turn = count()

    async def score(self, group: ray.ObjectRef) -> GroupRewards:
        """Rewards of one group."""
        index = next(self._turn) % len(self._scorers)
        return await within(
            self._scorers[index].score.remote(group),
            self._timeout_s,
            f"scorer {index} to score a group",
            "score_timeout_s",
        )


class ReferencePool:
    """The reference policies, taken in turn."""

    def __init__(self, config: Config, placement: Placement, model_folder: Path) -> None:
        self._timeout_s = config.score_timeout_s
        actor: Any = ReferencePolicy
        self._references = [
            actor.options(**placement.options("reference", index)).remote(str(model_folder), config, index)
            for index in range(config.num_references)
        ]
        self._turn = count()

    async def logprobs(self, group: ray.ObjectRef) -> tuple[ray.ObjectRef, NDArray[np.float32]]:
        """A reference to the log-probs of one group, and the KL of each completion."""
        index = next(self._turn) % len(self._references)
        header, payload = self._references[index].logprobs.remote(group)
        kl = await within(header, self._timeout_s, f"reference {index} to score a group", "score_timeout_s")
        return payload, kl


def _show(reporter: Reporter, step: int, metrics: dict[str, float], groups: list[TrainingGroup]) -> None:
    reporter.scalars("grpo", step, metrics)
    failures = [reason for group in groups for reason in group.group.rewards.reasons if reason is not None]
    if failures:
        reporter.line(f"grpo: step {step}: {len(failures)} completions could not be scored, e.g. {failures[0]}")
    reporter.update(
        step + 1,
        reward=metrics["reward/total"],
        staleness=metrics["staleness/max"],
        kl=metrics["kl"],
        entropy=metrics["entropy"],
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["grpo", *sys.argv[1:]]))
