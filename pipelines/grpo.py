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

from actors.learner_supervisor import LearnerSupervisor
from actors.placement import Placement, grpo_roles, place, plan
from actors.rollout_pool import RolloutPool
from actors.scoring_pools import ReferencePool, ScorerPool
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.dotted import resolve
from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.faults import RoleLostError
from medtvt_rl.types import Prompt
from pipelines import checkpoints
from pipelines.failure import forget_failure, write_failure
from pipelines.grpo_loop import EQUAL_REWARDS, GrpoLoop
from pipelines.grpo_roles import FinishedGroup, LoopResult, TrainedStep, TrainingGroup
from pipelines.held_out import HeldOutMeasurement
from pipelines.journal import Journal, failures
from pipelines.learner_start import CheckpointShelf, start_learner
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
    timeline, incidents = Timeline(), Incidents(lambda text: reporter.line(f"grpo: {text}"))
    forget_failure(config)
    try:
        rollouts, scoring, reference, (learner, shelf) = await asyncio.gather(
            RolloutPool.start(config, placement, folder, incidents, timeline, with_spares=True),
            ScorerPool.start(config, placement, folder, incidents, timeline),
            _start_reference(config, placement, folder, incidents, timeline),
            start_learner(config, placement, folder, timeline, incidents, found),
        )
        if found is not None:
            weights, checksum = await learner.export(first)
            await rollouts.update_weights(weights, first, checksum)
        reporter.start("grpo", config.grpo.steps, "step")
        with Journal(config.folder / "journal", tokenizer, first_step=first) as journal:
            incidents.record = journal.incident
            report = StepReport(reporter, journal, Alarms(config.alarms), incidents)
            held_out = _held_out(config, rollouts, tokenizer)
            limit = config.rollout.sampling.max_new_tokens
            keeper = Keeper(config, learner, shelf)
            loop = GrpoLoop(
                config.grpo, limit, sampler, rollouts, scoring, reference, learner, report, held_out, keeper
            )
            if found is not None:
                loop.load_state_dict(found.loop)
            result = await loop.run()
            await learner.save_model(config.stage_folder("grpo") / "model")
        for role in (rollouts, scoring, reference, learner):
            if role is not None:
                role.stop()
    except RoleLostError as error:
        raise write_failure(config, error) from error
    finally:
        placement.release()
        timeline.write(config.folder / "timeline.json")
    return {"summary": {"grpo": {**summarise(result), "alarms": report.sounded, **incidents.metrics()}}}


async def _start_reference(
    config: Config, placement: Placement, folder: Path, incidents: Incidents, timeline: Timeline
) -> ReferencePool | None:
    needed = grpo_roles(config)["reference"] > 0
    return await ReferencePool.start(config, placement, folder, incidents, timeline) if needed else None


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

    def __init__(self, config: Config, learner: LearnerSupervisor, shelf: CheckpointShelf) -> None:
        self._config, self._learner, self._shelf = config, learner, shelf

    async def save(self, version: int, state: dict[str, Any]) -> None:
        """See Checkpoints."""
        folder = checkpoints.unfinished(self._config, version)
        shutil.rmtree(folder, ignore_errors=True)
        await self._learner.save_checkpoint(folder / checkpoints.LEARNER)
        keep = self._config.grpo.keep_checkpoints
        await asyncio.to_thread(checkpoints.complete, self._config, version, state, keep)
        self._shelf.add(version)


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
    prompts: Sequence[Prompt] = resolve(config.task.prompts, "task.prompts")(config, tokenizer, split)
    if not prompts:
        if not required:
            return prompts
        raise ValueError(f"task.prompts {config.task.prompts} gave no prompt for the split {split!r}")
    # One token more than prompt and completion: the engine samples one when it scores a completion.
    room = config.rollout.engine.max_model_len - config.rollout.sampling.max_new_tokens - 1
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if len(longest.token_ids) > room:
        raise ValueError(
            f"prompt {longest.prompt_id} has {len(longest.token_ids)} tokens, and rollout.engine.max_model_len - "
            f"rollout.sampling.max_new_tokens - 1 leaves {room}; raise the former"
        )
    return prompts


class StepReport:
    """Tells reporter and journal what the loop does, and sounds the alarms."""

    def __init__(self, reporter: Reporter, journal: Journal, alarms: Alarms, incidents: Incidents) -> None:
        self._reporter, self._journal, self._alarms = reporter, journal, alarms
        self._incidents = incidents
        self.sounded: list[str] = []

    def step(self, trained: TrainedStep) -> None:
        """The step's metrics, its groups, and what was wrong with it."""
        metrics, step = trained.metrics, trained.step
        self._reporter.scalars("grpo", step, {**metrics, **self._incidents.metrics()})
        failed = {name: reason for group in trained.groups for name, reason in failures(group).items()}
        if failed:
            name, reason = next(iter(failed.items()))
            self._reporter.line(
                f"grpo: step {step}: {len(failed)} completions could not be scored, e.g. {name}: {reason}"
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


def _ids(groups: Sequence[TrainingGroup]) -> str:
    return ", ".join(str(group.group_id) for group in groups)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["grpo", *sys.argv[1:]]))
