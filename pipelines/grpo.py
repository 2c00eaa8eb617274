"""The GRPO stage: places the four kinds of actors, runs the loop, saves the policy.

RolloutGenerator x N --group--> RewardScorer x M, ReferencePolicy x R --> LearnerWorker x L
        ^                                                                      |
        +------------------------- weights of each step -----------------------+
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.deadline import within
from actors.failure import cause_of
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
from medtvt_rl.types import Prompt
from medtvt_rl.user_code import task_prompts
from pipelines.beside import beside
from pipelines.checkpoint_keeper import CheckpointKeeper
from pipelines.checkpoints import Checkpoint, CheckpointStore
from pipelines.failure import forget_failure, write_failure
from pipelines.generators import drained, elastic, generators_lines, generators_summary
from pipelines.group_ledger import GroupLedger
from pipelines.grpo_loop import GrpoLoop
from pipelines.grpo_roles import LoopResult, Scoring
from pipelines.held_out import HeldOutMeasurement
from pipelines.identity import identity_of
from pipelines.journal import Journal, fetch
from pipelines.learner_start import start_learner
from pipelines.memory import rare_collections
from pipelines.reporter import METRICS_FILE, Reporter, read_metrics
from pipelines.resume import AND_AUTO, find_resume
from pipelines.stages import start_model
from pipelines.step_report import StepReport
from pipelines.stopping import Stop, Stopped, stop_on_signals
from pipelines.timeline_file import TimelineFile

T = TypeVar("T")


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
        found = await self._stored("looked at", find_resume, config, self._store, identity, self._tell)
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
                await self._stored("removed", self._store.clear)
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
        return {"summary": {"grpo": {**summary, **await self._best()}}}

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
                known = GroupLedger.prompts(found.loop, sampler)
                groups = await self._stored("read", found.groups, known, ray.put)
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

    async def _stored(self, done: str, work: Callable[..., T], *args: Any) -> T:
        """What work on the checkpoints gives, by a store that may hang. Raises DeadlineError."""
        limit_s, what = self._config.grpo.checkpoint_timeout_s, f"the checkpoints to be {done}"
        return await within(in_own_thread(work, *args), limit_s, what, "grpo.checkpoint_timeout_s")

    def _show(self, placement: Placement) -> None:
        """Who sits where, for the reader and in the run folder."""
        drawing = placement.drawing()
        (self._config.folder / "placement.txt").write_text(f"{drawing}\n", encoding="utf-8")
        self._tell(f"placement\n{drawing}")

    async def _best(self) -> dict[str, Any]:
        """The best checkpoint on held-out answers, with a line for the reader."""
        metric = self._config.best_by
        try:
            best = await self._stored("asked for the best", self._store.best)
        except Exception as error:  # the policy is there for all that
            self._tell(f"the best checkpoint is not known: {cause_of(error)}")
            return {}
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


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["grpo", *sys.argv[1:]]))
