"""The GRPO stage: places the four kinds of actors, runs the loop, saves the policy.

RolloutGenerator x N --group--> RewardScorer x M, ReferencePolicy x R --> LearnerWorker x L
        ^                                                                      |
        +------------------------- weights of each step -----------------------+
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.learner_gang import LearnerGang
from actors.placement import Placement, grpo_roles, place, plan
from actors.rollout_pool import RolloutPool
from actors.scoring_pools import ReferencePool, ScorerPool
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.privacy import hashed, shows_samples
from medtvt_rl.types import Prompt
from medtvt_rl.user_code import task_prompts
from pipelines import checkpoints
from pipelines.grpo_loop import EQUAL_REWARDS, GrpoLoop
from pipelines.grpo_roles import FinishedGroup, LoopResult, TrainedStep, TrainingGroup
from pipelines.held_out import HeldOutMeasurement
from pipelines.journal import Journal, failures
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
    found = _found(config, reporter)
    first = 0 if found is None else found.version
    reporter.forget("grpo", first)
    placement = place(bundles, config.placement.timeout_s)
    timeline = Timeline()
    try:
        rollouts, scoring, reference, gang = await asyncio.gather(
            RolloutPool.start(config, placement, folder, lambda text: reporter.line(f"grpo: {text}"), timeline),
            ScorerPool.start(config, placement, folder, timeline),
            _start_reference(config, placement, folder, timeline),
            LearnerGang.start(config, placement, folder, timeline),
        )
        if found is not None:
            await gang.load_checkpoint(found.learner)
            weights, checksum = await gang.export(first)
            await rollouts.update_weights(weights, first, checksum)
        reporter.start("grpo", config.grpo.steps, "step")
        with Journal(config.folder / "journal", tokenizer, first_step=first, with_texts=shows_samples()) as journal:
            report = StepReport(reporter, journal, Alarms(config.alarms))
            held_out = _held_out(config, rollouts, tokenizer)
            limit = config.rollout.sampling.max_new_tokens
            keeper = Keeper(config, gang)
            loop = GrpoLoop(config.grpo, limit, sampler, rollouts, scoring, reference, gang, report, held_out, keeper)
            if found is not None:
                loop.load_state_dict(found.loop)
            result = await loop.run()
        await gang.save_model(config.stage_folder("grpo") / "model")
        rollouts.stop()
        gang.stop()
    finally:
        placement.release()
        timeline.write(config.folder / "timeline.json")
    return {"summary": {"grpo": {**summarise(result), "alarms": report.sounded}}}


async def _start_reference(
    config: Config, placement: Placement, folder: Path, timeline: Timeline
) -> ReferencePool | None:
    needed = grpo_roles(config)["reference"] > 0
    return await ReferencePool.start(config, placement, folder, timeline) if needed else None


def _found(config: Config, reporter: Reporter) -> checkpoints.Checkpoint | None:
    """Where an interrupted stage goes on, with a line for the reader."""
    if config.resume == "never":
        return None
    found = checkpoints.newest(config, lambda text: reporter.line(f"grpo: {text}"))
    if found is not None:
        changed = checkpoints.check_settings(found, config)
        settings = f", with {'; '.join(changed)}" if changed else ""
        reporter.line(f"grpo: goes on from step {found.version} ({found.folder}){settings}")
    return found


class Keeper:
    """Writes checkpoints: the learners their part, then the loop's state and the manifest."""

    def __init__(self, config: Config, gang: LearnerGang) -> None:
        self._config, self._gang = config, gang

    async def save(self, version: int, state: dict[str, Any]) -> None:
        """See Checkpoints."""
        folder = checkpoints.unfinished(self._config, version)
        shutil.rmtree(folder, ignore_errors=True)
        await self._gang.save_checkpoint(folder / checkpoints.LEARNER)
        keep = self._config.grpo.keep_checkpoints
        await asyncio.to_thread(checkpoints.complete, self._config, version, state, keep)


def _held_out(config: Config, rollouts: RolloutPool, tokenizer: PreTrainedTokenizerBase) -> HeldOutMeasurement | None:
    """None where it is off, or the task has no prompt in that split."""
    settings = config.grpo.held_out
    if settings.every_steps < 1:
        return None
    prompts = load_prompts(config, tokenizer, settings.split, required=False)
    return HeldOutMeasurement(config, rollouts, tokenizer, prompts) if prompts else None


def summarise(result: LoopResult) -> dict[str, float]:
    """What the summary says of the loop; first and last reward are means over a tenth of the steps."""
    tail = max(1, len(result.rewards) // 10)
    return {
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "completions": result.completions,
        "discarded": result.discarded,
        "replaced": result.replaced,
        "nonfinite": result.nonfinite,
        "max_staleness_seen": result.max_staleness_seen,
        "logprob_max_abs_diff": result.logprob_max_abs_diff,
        "reward_first": float(np.mean(result.rewards[:tail])),
        "reward_last": float(np.mean(result.rewards[-tail:])),
    }


def load_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: str, required: bool = True
) -> Sequence[Prompt]:
    """The task's prompts of a split. Raises ValueError if there are none (unless they are not `required`) or one does
    not fit the engine."""
    prompts = task_prompts(config, tokenizer, split)
    if not prompts:
        if not required:
            return prompts
        raise ValueError(f"task.prompts {config.task.prompts} gave no prompt for the split {split!r}")
    # One token more than prompt and completion: the engine samples one when it scores a completion.
    room = config.rollout.engine.max_model_len - config.rollout.sampling.max_new_tokens - 1
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if len(longest.token_ids) > room:
        raise ValueError(
            f"prompt {hashed(longest.prompt_id)} has {len(longest.token_ids)} tokens, and "
            f"rollout.engine.max_model_len - rollout.sampling.max_new_tokens - 1 leaves {room}; raise the former"
        )
    return prompts


class StepReport:
    """Tells reporter and journal what the loop does, and sounds the alarms."""

    def __init__(self, reporter: Reporter, journal: Journal, alarms: Alarms) -> None:
        self._reporter, self._journal, self._alarms = reporter, journal, alarms
        self.sounded: list[str] = []

    def step(self, trained: TrainedStep) -> None:
        """The step's metrics, its groups, and what was wrong with it."""
        metrics, step = trained.metrics, trained.step
        self._reporter.scalars("grpo", step, metrics)
        failed = {name: reason for group in trained.groups for name, reason in failures(group).items()}
        if failed:
            name, reason = next(iter(failed.items()))
            self._reporter.line(
                f"grpo: step {step}: {len(failed)} completions could not be scored, e.g. {name}: {_shown(reason)}"
            )
        if metrics.get("skipped", 0.0) > 0:
            self._reporter.line(
                f"grpo: step {step} changed nothing, loss or gradient not finite, on groups {_ids(trained.groups)}"
            )
        for alarm in self._alarms.check(step, metrics):
            self.sounded.append(alarm)
            self._reporter.line(f"grpo: ALARM: {alarm}")
        self._reporter.update(
            step + 1,
            reward=metrics["reward/total"],
            staleness=metrics["staleness/max"],
            kl=metrics["kl"],
            entropy=metrics["entropy"],
        )
        self._journal.write(trained)

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """A line for the reader, the whole reason for the journal."""
        self._reporter.line(f"grpo: group {group_id} discarded: {reason.splitlines()[0]}")
        self._journal.discarded(group_id, prompt_id, reason)

    def replaced(self, group: FinishedGroup) -> None:
        """For the journal alone: it is what dynamic sampling is for."""
        self._journal.discarded(group.header.group_id, group.header.prompt_id, EQUAL_REWARDS)

    def nonfinite(self, step: int, groups: Sequence[TrainingGroup], reason: str) -> None:
        """A line for the reader; the learners have saved the groups."""
        self._reporter.line(
            f"grpo: step {step} goes on without groups {_ids(groups)}: {reason}; they lie in journal/nonfinite"
        )
        for group in groups:
            header = group.group.header
            self._journal.discarded(header.group_id, header.prompt_id, f"step {step}: {reason}")


def _shown(reason: str) -> str:
    """Of why a reward function failed: which, and the type of the error; its words may be those of a patient."""
    if shows_samples():
        return reason
    return f"{': '.join(reason.split(': ', 2)[:2])} (the whole reason is in journal/groups.jsonl)"


def _ids(groups: Sequence[TrainingGroup]) -> str:
    return ", ".join(str(group.group_id) for group in groups)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["grpo", *sys.argv[1:]]))
