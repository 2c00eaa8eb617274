"""The GRPO stage: places the four kinds of actors, runs the loop, saves the policy.

RolloutGenerator x N --group--> RewardScorer x M, ReferencePolicy x R --> LearnerWorker x L
        ^                                                                      |
        +------------------------- weights of each step -----------------------+
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.learner_supervisor import LearnerSupervisor
from actors.own_thread import in_own_thread
from actors.placement import Bundle, Placement, grpo_roles, placed, plan
from actors.rollout_pool import RolloutPool
from actors.scoring_pools import ReferencePool, ScorerPool
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config, to_yaml
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.dotted import resolve
from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.faults import RoleLostError
from medtvt_rl.privacy import hashed, shows_samples
from medtvt_rl.rollout.balance import Share
from medtvt_rl.types import Prompt
from medtvt_rl.user_code import task_prompts
from pipelines.beside import beside
from pipelines.checkpoint_keeper import CheckpointKeeper
from pipelines.checkpoints import Checkpoint, CheckpointStore
from pipelines.failure import forget_failure, write_failure
from pipelines.generators import drained, elastic, generators_lines, generators_summary
from pipelines.group_ledger import EQUAL_REWARDS, GroupLedger
from pipelines.grpo_loop import GrpoLoop
from pipelines.grpo_roles import FinishedGroup, LoopResult, Scoring, TrainedStep, TrainingGroup
from pipelines.held_out import HeldOutMeasurement
from pipelines.identity import identity_of
from pipelines.journal import Journal, failures, fetch
from pipelines.learner_start import start_learner
from pipelines.memory import rare_collections
from pipelines.reporter import METRICS_FILE, Reporter, read_metrics
from pipelines.resume import AND_AUTO, find_resume
from pipelines.stages import start_model
from pipelines.step_metrics import generator_metrics
from pipelines.stopping import Stop, Stopped, stop_on_signals
from pipelines.timeline_file import TimelineFile


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Trains; leaves the policy in stages/grpo/model and returns what the summary says of it."""
    with rare_collections():
        return asyncio.run(_train(config, reporter))


def finished(config: Config) -> None:
    """Marks the stage as done: a later one does not go on from its checkpoints."""
    CheckpointStore.of(config).finish()


async def _train(config: Config, reporter: Reporter) -> dict[str, Any]:
    stop = Stop()
    with stop_on_signals(stop):
        try:
            layout = resolve(config.grpo.layout, "grpo.layout")(config, reporter, stop)
            return dict(await layout.run())
        except asyncio.CancelledError:
            raise Stopped(stop.number, f"asked twice to stop. {_goes_on(config)}") from None


class RunningScoring(Scoring, Protocol):
    """Scorers that can be ended."""

    def stop(self) -> None:
        """Ends them."""


class Layout:
    """One run of the stage, from what it starts from or goes on from to the saved policy. `grpo.layout` may name one of
    its kind that has another role: see docs/reuse.md.
    """

    def __init__(self, config: Config, reporter: Reporter, stop: Stop) -> None:
        self._config, self._reporter, self._stop = config, reporter, stop
        self._folder = start_model(config)
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        self._prompts = load_prompts(config, self._tokenizer, "train")
        self._store = CheckpointStore.of(config)
        self._timeline, self._incidents = Timeline(), Incidents(self._tell)
        self._timeline_file = TimelineFile(self._timeline, config.folder, self._tell)

    async def run(self) -> dict[str, Any]:
        """Returns what the summary says of the stage."""
        config = self._config
        identity = await asyncio.to_thread(identity_of, config, self._folder, self._prompts)
        found = await in_own_thread(find_resume, config, self._store, identity, self._tell)
        # Generators that are asked for beyond rollout.min join when they have their nodes.
        bundles = [b for b in self.bundles(config) if b.role != "rollout" or b.index < config.rollout.least]
        self._tell(f"starting {len(bundles)} actors")
        self._reporter.forget("grpo", _first(found))
        forget_failure(config)
        self._timeline_file.begin(_first(found))
        placement = await self._stop.unless(placed(bundles, config.placement, self._tell), None)
        if placement is None:
            raise Stopped(self._stop.number, f"no step was taken. {_goes_on(config)}")
        self._show(placement)
        newest, keeper = None if found is None else found.version, None
        try:
            roles = await self._stop.unless(self._start(placement, found), None)
            if roles is None:
                raise Stopped(self._stop.number, f"no step was taken. {_goes_on(config)}")
            rollouts, scoring, reference, learner = roles
            rollouts.ask_learner(learner.export_again)
            if found is None:
                await in_own_thread(self._store.clear)
            else:
                weights, checksum = await learner.export(found.version)
                await rollouts.update_weights(weights, found.version, checksum)
            keeper = CheckpointKeeper(config, self._store, learner, identity, self._tell, fetch, newest)
            summary = await self._loop(found, placement, rollouts, scoring, reference, learner, keeper)
            for role in (rollouts, scoring, reference, learner):
                if role is not None:
                    role.stop()
        except RoleLostError as error:
            newest = newest if keeper is None else keeper.newest
            place = None if newest is None else self._store.place(newest)
            raise write_failure(config, place, error) from error
        finally:
            placement.release()
            self._timeline_file.write()
        return {"summary": {"grpo": {**summary, **self._best()}}}

    @staticmethod
    def bundles(config: Config) -> list[Bundle]:
        """What is placed."""
        return plan(config, grpo_roles(config))

    async def start_scoring(
        self, config: Config, placement: Placement, model_folder: Path, incidents: Incidents, timeline: Timeline
    ) -> RunningScoring:
        """Who scores finished groups."""
        return await ScorerPool.start(config, placement, model_folder, incidents, timeline)

    def _start(self, placement: Placement, found: Checkpoint | None) -> Awaitable[Any]:
        where, told = (self._config, placement, self._folder), (self._incidents, self._timeline)
        needs_reference = grpo_roles(self._config)["reference"] > 0
        return asyncio.gather(
            RolloutPool.start(*where, *told, with_spares=True),
            self.start_scoring(*where, *told),
            ReferencePool.start(*where, *told) if needs_reference else asyncio.sleep(0),
            start_learner(*where, *told, self._store, found),
        )

    async def _loop(
        self,
        found: Checkpoint | None,
        placement: Placement,
        rollouts: RolloutPool,
        scoring: RunningScoring,
        reference: ReferencePool | None,
        learner: LearnerSupervisor,
        keeper: CheckpointKeeper,
    ) -> dict[str, Any]:
        config, reporter = self._config, self._reporter
        sampler = PromptSampler(self._prompts, config.run.seed)
        reporter.start("grpo", config.grpo.steps, "step")
        is_known = None if found is None else GroupLedger.known(found.loop)
        folder, limit = config.folder / "journal", config.rollout.sampling.max_new_tokens
        kept = _first(found), is_known, shows_samples(), to_yaml(config)
        journal = Journal(folder, self._tokenizer, fetch, *kept)
        with journal, self._incidents.recorded(journal.incident):
            report = StepReport(reporter, journal, Alarms(config.alarms), self._incidents, rollouts.shares)
            report.show_again(read_metrics(config.folder / METRICS_FILE))
            held_out = _held_out(config, rollouts, self._tokenizer)
            collaborators = sampler, rollouts, scoring, reference, learner, report, held_out, keeper, self._stop
            loop = GrpoLoop(config.grpo, limit, *collaborators)
            if found is not None:
                groups = await in_own_thread(found.groups, GroupLedger.prompts(found.loop, sampler), ray.put)
                loop.load_state_dict(found.loop, groups)
            # Scoring of another layout may hold several pools.
            scorers = getattr(scoring, "pools", {"reward": scoring})
            pools = {"rollout": rollouts, "reference": reference, **scorers}
            async with (
                elastic(config, rollouts, placement, report, self._tell),
                drained(config, pools, placement, loop.keep_soon, self._tell),
                beside(self._timeline_file.keep(), lambda why: self._tell(f"no timeline: {why}")),
            ):
                result = await loop.run()
            if self._stop.requested:
                raise Stopped(self._stop.number, _where(config, keeper, result))
            await keeper.close()
            await learner.save_model(config.stage_folder("grpo") / "model")
        generators = generators_summary(rollouts.shares(), placement.kinds("rollout"))
        for line in generators_lines(generators):
            self._tell(line)
        found_out = {"alarms": report.sounded, "generators": generators}
        return {**summarise(result), **found_out, **self._incidents.metrics()}

    def _show(self, placement: Placement) -> None:
        """Who sits where, for the reader and in the run folder."""
        drawing = placement.drawing()
        (self._config.folder / "placement.txt").write_text(f"{drawing}\n", encoding="utf-8")
        self._tell(f"placement\n{drawing}")

    def _best(self) -> dict[str, Any]:
        """The best checkpoint on held-out answers, with a line for the reader."""
        best, metric = self._store.best(), self._config.best_by
        if best is None:
            return {}
        step, value = best
        self._tell(f"best checkpoint by held-out {metric}: step {step}, {value:.4g} ({self._store.place(step)})")
        return {"best_checkpoint": {"step": step, metric: value}}

    def _tell(self, text: str) -> None:
        self._reporter.line(f"grpo: {text}")


def _first(found: Checkpoint | None) -> int:
    """The first step of the run."""
    return 0 if found is None else found.version


def _goes_on(config: Config) -> str:
    return f"The same command {AND_AUTO[config.resume]}goes on from there"


def _where(config: Config, keeper: CheckpointKeeper, result: LoopResult) -> str:
    """From where a stopped run goes on."""
    if keeper.newest is None:
        return f"no checkpoint was written, {result.steps} steps are lost. {_goes_on(config)}"
    lost = f", {result.steps - keeper.newest} steps are lost" if keeper.newest < result.steps else ""
    return f"the newest checkpoint is that of step {keeper.newest}{lost}. {_goes_on(config)}"


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
        "empty_completions": result.empty_completions,
        "one_token_completions": result.one_token_completions,
        "unscored_completions": result.unscored_completions,
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

    def __init__(
        self,
        reporter: Reporter,
        journal: Journal,
        alarms: Alarms,
        incidents: Incidents,
        shares: Callable[[], Sequence[Share]] = list,
    ) -> None:
        self._reporter, self._journal, self._alarms = reporter, journal, alarms
        self._incidents, self._shares = incidents, shares
        self.sounded: list[str] = []
        self.listener: Callable[[Mapping[str, float]], None] = lambda metrics: None

    def show_again(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The steps before a resume: the alarms go on from there."""
        for row in rows:
            if row["stage"] == "grpo":
                metrics = {name: value for name, value in row.items() if isinstance(value, float)}
                self.sounded.extend(self._alarms.check(int(row["step"]), metrics))

    def step(self, trained: TrainedStep) -> None:
        """The step's metrics, its groups, and what was wrong with it."""
        metrics, step = trained.metrics, trained.step
        if all(group.group.reference_header is None for group in trained.groups):
            # Without a reference nothing was measured; the learner's sum over no tokens is 0.
            metrics = {name: value for name, value in metrics.items() if name != "kl"}
        of_generators = generator_metrics(self._shares())
        self._reporter.scalars("grpo", step, {**metrics, **of_generators, **self._incidents.metrics()})
        self.listener(metrics)
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
        self._sound(step, metrics)
        words = {"reward": "reward/total", "staleness": "staleness/max", "kl": "kl", "entropy": "entropy"}
        shown = {word: metrics[name] for word, name in words.items() if name in metrics}
        self._reporter.update(step + 1, total=None, **shown)
        self._journal.write(trained)

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """A line for the reader, the whole reason for the journal."""
        self._reporter.line(f"grpo: group {group_id} discarded: {reason.splitlines()[0]}")
        self._journal.discarded(group_id, prompt_id, reason)

    def replaced(self, group: FinishedGroup) -> None:
        """For the journal alone: it is what dynamic sampling is for."""
        self._journal.discarded(group.header.group_id, group.header.prompt_id, EQUAL_REWARDS)

    def nonfinite(self, step: int, groups: Sequence[TrainingGroup], reason: str, updates: int) -> None:
        """A line for the reader; the learners have saved the groups."""
        what = f"stopped after update {updates} because of" if updates else "goes on without"
        self._reporter.line(f"grpo: step {step} {what} groups {_ids(groups)}: {reason}; they lie in journal/nonfinite")
        if updates:
            return  # they were trained on
        for group in groups:
            header = group.group.header
            self._journal.discarded(header.group_id, header.prompt_id, f"step {step}: {reason}")

    def measured(self, metrics: Mapping[str, float]) -> None:
        """A row of their own, at the step that made the version, or the first for what the run started with."""
        step = max(0, int(metrics["held_out/version"]) - 1)
        self._reporter.scalars("grpo", step, metrics)
        self._sound(step, metrics)

    def unmeasured(self, version: int, what: str, error: Exception) -> None:
        """A line for the reader; training does not hang on it."""
        why = (str(error).splitlines() or [""])[0]
        self._reporter.line(f"grpo: version {version}: {what} could not be measured: {type(error).__name__}: {why}")

    def _sound(self, step: int, metrics: Mapping[str, float]) -> None:
        for alarm in self._alarms.check(step, metrics):
            self.sounded.append(alarm)
            self._reporter.line(f"grpo: ALARM: {alarm}")


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
