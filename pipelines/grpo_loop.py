"""The one training loop: synchronous training is the asynchronous one with `max_staleness: 0`.

    sampler -> admit -> generate -> score + reference -> sift -> buffer -> train -> publish -> probe -> conclude
                 ^                                                            |
                 +------------ a slot comes back with the new version --------+

Two tasks share one asyncio loop and one AdmissionBuffer; what is measured of a step is concluded beside the next one:
    _produce  consumes admissions, produces finished groups; waits for free slots; a published version unblocks it.
    _train    consumes a step's finished groups, produces a version; waits for them; a finished group unblocks it.
It moves headers and references, never tensors, and knows nothing of medicine, Ray, vLLM or DeepSpeed: its collaborators
are the Protocols of grpo_roles.py.

At `max_staleness: 0` the order of everything that reaches an engine or the learner is fixed: groups go out in waves
that an engine begins with as a whole, and the checks after a publication run before the next wave. The same seed on the
same machine then gives the same weights, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medtvt_rl.algorithm.advantages import has_signal
from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.faults import RoleLostError
from medtvt_rl.learner.schedule import linear_decay
from medtvt_rl.rollout.buffer import AdmissionBuffer
from medtvt_rl.types import LearnerStep, Prompt
from pipelines.grpo_roles import (
    Checkpoints,
    FinishedGroup,
    HeldOut,
    Learner,
    LoopResult,
    Observer,
    Reference,
    Rollouts,
    Scoring,
    TrainedStep,
    TrainingGroup,
)
from pipelines.measuring import Measuring, Probe, engine_gap
from pipelines.step_metrics import StepClock, role_metrics, rollout_metrics
from pipelines.training_groups import with_advantages

MAX_DISCARDED_IN_A_ROW = 8
MAX_SKIPPED_IN_A_ROW = 5
EQUAL_REWARDS = "all rewards equal"


class LoopError(RuntimeError):
    """The loop cannot go on; the message says which group and why."""


class GrpoLoop:
    """Drives generators, scorers, reference and learner until `config.steps` steps are done.

    Args:
        max_new_tokens: length limit of a completion.
    """

    def __init__(
        self,
        config: GrpoConfig,
        max_new_tokens: int,
        sampler: PromptSampler,
        rollouts: Rollouts,
        scoring: Scoring,
        reference: Reference | None,
        learner: Learner,
        observer: Observer,
        held_out: HeldOut | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._config, self._max_new_tokens = config, max_new_tokens
        self._sampler, self._observer = sampler, observer
        self._rollouts, self._scoring = rollouts, scoring
        self._reference, self._learner = reference, learner
        self._checkpoints = checkpoints
        self._on_policy = config.max_staleness == 0
        self._buffer: AdmissionBuffer[FinishedGroup] = AdmissionBuffer(config.groups_per_step, config.max_staleness)
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: set[int] = set()
        self._undecided: dict[int, FinishedGroup | None] = {}
        self._prompt_of: dict[int, int] = {}
        self._again: list[tuple[int, Prompt]] = []
        self._measuring = Measuring(held_out, config.held_out, config.steps, self._on_policy)
        self._conclusion: asyncio.Task[None] | None = None
        self._stats: list[dict[str, float]] = []
        self._discarded_in_a_row = self._skipped_in_a_row = 0
        self._counted_before_step = (0, 0)
        self._last_failure = LoopError("no group has failed")
        self._lost: RoleLostError | None = None
        self.result = LoopResult()

    async def run(self) -> LoopResult:
        """Runs to the last step; whatever ends it, no task of its own stays behind."""
        await self._measuring.begin(self._buffer.version)
        producer = asyncio.create_task(self._produce(), name="produce")
        trainer = asyncio.create_task(self._train(), name="train")
        try:
            done, _ = await asyncio.wait({producer, trainer}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            leftover: list[asyncio.Task[Any]] = [producer, trainer, *self._tasks]
            leftover += [task for task in (self._conclusion, self._measuring.task) if task is not None]
            for each in leftover:
                each.cancel()
            await asyncio.gather(*leftover, return_exceptions=True)
        return self.result

    def state_dict(self, version: int) -> dict[str, Any]:
        """What a checkpoint of the learners' `version` needs beside it; JSON-ready. Groups that those weights have not
        seen are kept by id and prompt, and made again with the same seeds."""
        buffer = self._buffer.state_dict(version)
        return {
            "buffer": buffer,
            "sampler": self._sampler.state_dict(),
            "prompts": {str(group_id): self._prompt_of[group_id] for group_id in buffer["pending"]},
            "result": asdict(self.result),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; engines and learners hold the weights of its version."""
        self._sampler.load_state_dict(state["sampler"])
        self.result = LoopResult(**state["result"])
        self._counted_before_step = (self.result.discarded, self.result.replaced)
        for group_id in self._buffer.load_state_dict(state["buffer"]):
            self._prompt_of[group_id] = state["prompts"][str(group_id)]
            self._expect(group_id)
            self._again.append((group_id, self._sampler.prompt(self._prompt_of[group_id])))

    # From prompt to buffer.

    async def _produce(self) -> None:
        wave = self._again
        while True:
            if not wave:
                async with self._changed:
                    await self._changed.wait_for(self._may_start_wave)
                    wave = self._admit_wave()
            if self._on_policy:
                self._rollouts.together([group_id for group_id, _ in wave], self._config.group_size)
            for group_id, prompt in wave:
                task = asyncio.create_task(self._roll(group_id, prompt), name=f"group {group_id}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            wave = []

    def _may_start_wave(self) -> bool:
        return self._may_admit() and not (self._on_policy and self._in_flight)

    def _may_admit(self) -> bool:
        if self._failing():
            return False
        wanted = self._config.steps * self._config.groups_per_step
        counts = self._buffer.counts
        return self._buffer.can_admit() and counts.admitted - counts.discarded < wanted

    def _admit_wave(self) -> list[tuple[int, Prompt]]:
        """Every group that may be started now, with its prompt."""
        wave = []
        while self._may_admit():
            group_id = self._buffer.admit()
            _, self._prompt_of[group_id], prompt = self._sampler.next()
            self._expect(group_id)
            wave.append((group_id, prompt))
        return wave

    def _expect(self, group_id: int) -> None:
        self._in_flight.add(group_id)
        self._undecided[group_id] = None

    async def _roll(self, group_id: int, prompt: Prompt) -> None:
        """One group from prompt to buffer; one that fails is discarded with its reason, and another takes its place."""
        try:
            group, error = await self._make(group_id, prompt), None
        except Exception as failure:
            group, error = None, failure
        async with self._changed:
            self._in_flight.discard(group_id)
            if isinstance(error, RoleLostError):
                self._lost = error  # the group stays, for a resume
            elif group is None:
                del self._undecided[group_id]
                self._discard(group_id, prompt, error)
            else:
                self._discarded_in_a_row = 0
                self._undecided[group_id] = group
            self._sift()
            self._changed.notify_all()

    async def _make(self, group_id: int, prompt: Prompt) -> FinishedGroup:
        header, payload = await self._rollouts.generate(prompt, group_id, self._config.group_size)
        rewards, (handle, reference) = await asyncio.gather(self._scoring.score(payload), self._refer(payload))
        return FinishedGroup(
            header=header, payload=payload, rewards=rewards, reference=handle, reference_header=reference
        )

    async def _refer(self, payload: Any) -> tuple[Any, Any]:
        return (None, None) if self._reference is None else await self._reference.logprobs(payload)

    def _discard(self, group_id: int, prompt: Prompt, error: Exception | None) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._observer.discarded(group_id, prompt.prompt_id, reason)
        self._buffer.discard(group_id, reason.splitlines()[0])
        del self._prompt_of[group_id]
        self.result.discarded += 1
        self._discarded_in_a_row += 1
        self._last_failure = LoopError(f"group {group_id}: {error}")
        self._last_failure.__cause__ = error

    def _sift(self) -> None:
        """Hands finished groups to the buffer; with dynamic sampling those of equal rewards make way for others.

        They are then judged in id order, so that it does not hang on a group's speed which ones are replaced.
        """
        in_order = self._config.dynamic_sampling.max_replaced > 0
        for group_id, group in list(self._undecided.items()):
            if group is None:
                if in_order:
                    return
                continue
            del self._undecided[group_id]
            if self._is_replaceable(group):
                self._buffer.discard(group_id, EQUAL_REWARDS)
                del self._prompt_of[group_id]
                self.result.replaced += 1
                self._observer.replaced(group)
            else:
                self._buffer.finish(group_id, group, group.header.oldest_version)

    def _is_replaceable(self, group: FinishedGroup) -> bool:
        allowed = self._config.dynamic_sampling.max_replaced * (self._buffer.steps_taken + 1)
        return self.result.replaced < allowed and not has_signal(group.rewards.total)

    def _failing(self) -> bool:
        return self._lost is not None or self._discarded_in_a_row >= MAX_DISCARDED_IN_A_ROW

    # From buffer to published weights.

    async def _train(self) -> None:
        self._stats = await self._rollouts.stats()
        clock: StepClock | None = None
        for step in range(self._buffer.version, self._config.steps):
            clock, version, rate = StepClock(clock), step + 1, self._learning_rate(step)
            taken = groups = await self._take()
            clock.lap("wait_groups")
            groups, outcome = await self._learn(groups, rate, step)
            clock.lap("train")
            await self._concluded()
            weights, checksum = await self._learner.export(version)
            try:
                await self._rollouts.update_weights(weights, version, checksum)
            except RoleLostError as error:
                self._lost = error  # the step ends as it should before the run does
            clock.lap("publish")
            clock.end()
            if not self._on_policy:
                await self._release(version)
            probe = await self._probe(groups)
            clock.lap("probe")
            trained = TrainedStep(
                step=step,
                groups=tuple(groups),
                learning_rate=rate,
                checksum=checksum,
                metrics={**outcome.metrics, **clock.seconds},
            )
            self._conclusion = asyncio.create_task(self._conclude(trained, outcome, probe), name=f"conclude {step}")
            keeps = self._is_kept(version)
            if self._on_policy or keeps or version == self._config.steps:
                await self._concluded()
            for group in taken:
                del self._prompt_of[group.group_id]
            if keeps and self._checkpoints is not None:
                await self._checkpoints.save(version, self.state_dict(version))
            if self._on_policy:
                await self._release(version)

    async def _end(self, error: RoleLostError) -> None:
        """Leaves a checkpoint of the last step, and raises."""
        await self._concluded()
        version = self._buffer.steps_taken
        if self._checkpoints is not None and version > 0:
            await self._checkpoints.save(version, self.state_dict(version))
        raise error

    def _is_kept(self, version: int) -> bool:
        every = self._config.checkpoint_every
        return self._checkpoints is not None and every > 0 and version % every == 0 and version < self._config.steps

    def _learning_rate(self, step: int) -> float:
        config = self._config
        return linear_decay(step, config.steps, config.learning_rate, config.warmup_steps, config.final_lr_share)

    async def _concluded(self) -> None:
        """Returns when the step before is wholly told of; what was wrong with it is raised here."""
        if self._conclusion is not None:
            task, self._conclusion = self._conclusion, None
            await task

    async def _take(self) -> list[TrainingGroup]:
        """A step's groups with their advantages, once they are there."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._buffer.ready() or self._failing())
            if self._lost is not None:
                await self._end(self._lost)
            if not self._buffer.ready():
                raise self._last_failure
            taken = [group for _, group in self._buffer.take()]
        return [with_advantages(group, self._config, self._max_new_tokens) for group in taken]

    async def _learn(
        self, groups: list[TrainingGroup], rate: float, step: int
    ) -> tuple[list[TrainingGroup], LearnerStep]:
        """One optimizer step; where it is not finite it is tried again without the groups that caused it."""
        while True:
            outcome = await self._learner.train_step(groups, rate, step)
            culprits = [group for group in groups if group.group_id in outcome.culprits]
            if not culprits:
                return groups, outcome
            self.result.nonfinite += len(culprits)
            self._observer.nonfinite(step, culprits, str(outcome.skipped))
            if self.result.nonfinite > self._config.max_nonfinite_groups:
                ids = ", ".join(str(group.group_id) for group in culprits)
                raise LoopError(
                    f"{self.result.nonfinite} groups so far were not finite (grpo.max_nonfinite_groups = "
                    f"{self._config.max_nonfinite_groups}), the last in step {step}: groups {ids}, {outcome.skipped}; "
                    "lower grpo.learning_rate, or look at the saved groups"
                )
            left = [group for group in groups if group.group_id not in outcome.culprits]
            if not left or outcome.metrics.get("updates", 0.0) > 0:
                return groups, outcome
            groups = left

    async def _release(self, version: int) -> None:
        async with self._changed:
            self._buffer.published(version)
            self._changed.notify_all()

    async def _probe(self, groups: list[TrainingGroup]) -> Probe | None:
        """The learner's log-probs of a completion under the weights just published."""
        group = groups[0].group
        index = int(np.argmax(group.header.lengths))
        if group.header.lengths[index] == 0:
            return None
        return group.payload, index, await self._learner.score(group.payload, index)

    async def _conclude(self, trained: TrainedStep, outcome: LearnerStep, probe: Probe | None) -> None:
        """What is measured of the weights of a step, beside the next one; on-policy before it, since nothing else may
        then run on the engines."""
        metrics = {"sync_gap_max": 0.0}
        try:
            metrics = {"sync_gap_max": await engine_gap(self._rollouts, probe)}
            metrics |= await self._measuring.ready(trained.step + 1)
            before, self._stats = self._stats, await self._rollouts.stats()
            metrics |= role_metrics(before, self._stats, trained.groups, trained.metrics)
        except RoleLostError as error:
            self._lost = error
        self._tell(replace(trained, metrics={**trained.metrics, **metrics}))
        self._count_skipped(trained, outcome)

    def _tell(self, trained: TrainedStep) -> None:
        """Adds a step to the result, with what its groups say, and tells the observer."""
        result, before = self.result, self._counted_before_step
        self._counted_before_step = (result.discarded, result.replaced)
        metrics = {
            **trained.metrics,
            **rollout_metrics(trained.groups, trained.step),
            "groups/discarded": float(result.discarded - before[0]),
            "groups/replaced": float(result.replaced - before[1]),
        }
        result.steps = trained.step + 1
        result.completions += sum(len(g.group.header.lengths) for g in trained.groups)
        result.max_staleness_seen = max(result.max_staleness_seen, int(metrics["staleness/max"]))
        result.rewards.append(metrics["reward/total"])
        gaps = (result.logprob_max_abs_diff, metrics["sync_gap_max"], metrics.get("fresh_gap_max", 0.0))
        result.logprob_max_abs_diff = max(gaps)
        self._observer.step(replace(trained, metrics=metrics))

    def _count_skipped(self, trained: TrainedStep, outcome: LearnerStep) -> None:
        """Raises LoopError where too many steps in a row changed no weight."""
        skipped = outcome.skipped is not None
        self.result.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            ids = ", ".join(str(group.group_id) for group in trained.groups)
            raise LoopError(
                f"{MAX_SKIPPED_IN_A_ROW} learner steps in a row were skipped because a loss or gradient was not "
                f"finite, the last on groups {ids}; lower grpo.learning_rate"
            )
