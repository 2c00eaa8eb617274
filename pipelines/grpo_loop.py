"""The one training loop: synchronous training is the asynchronous one with `max_staleness: 0`.

    sampler -> admit -> generate -> score + reference -> sift -> buffer -> train -> publish -> probe -> conclude
                 ^                                                            |
                 +------------ a slot comes back with the new version --------+

Two tasks share one asyncio loop and one AdmissionBuffer; what is measured of a step is concluded beside the next one:
    _produce  consumes admissions, produces finished groups; waits for free slots; a published version unblocks it.
    _train    consumes a step's finished groups, produces a version; waits for them; a finished group unblocks it.
It moves headers and references, never tensors, and knows nothing of medicine, Ray, vLLM or DeepSpeed: its collaborators
are the Protocols of grpo_roles.py. Where each group stands is the GroupLedger's matter (group_ledger.py).

Asked to stop (stopping.py), it ends the step that the learner has begun, waits for nothing else, and writes a
checkpoint.

At `max_staleness: 0` the order of everything that reaches an engine or the learner is fixed: groups go out in waves
that an engine begins with as a whole, and the checks after a publication run before the next wave. The same seed on the
same machine then gives the same weights, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.faults import RoleLostError
from medtvt_rl.learner.schedule import linear_decay
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import Prompt
from pipelines.finite_steps import FiniteSteps
from pipelines.group_ledger import GroupLedger
from pipelines.grpo_roles import (
    Checkpoints,
    FinishedGroup,
    HeldOut,
    Learner,
    LoopError,
    LoopResult,
    Observer,
    Reference,
    Rollouts,
    Scoring,
    TrainedStep,
    TrainingGroup,
)
from pipelines.measuring import Measuring, Probe, engine_gap, unless_failed
from pipelines.step_clock import StepClock
from pipelines.step_metrics import role_metrics, rollout_metrics
from pipelines.stopping import Stop, cancelled
from pipelines.training_groups import with_advantages

T = TypeVar("T")
MAX_DISCARDED_IN_A_ROW = 8


class GrpoLoop:
    """Drives generators, scorers, reference and learner until `config.steps` steps are done.

    Args:
        max_new_tokens: length limit of a completion.
        stop: when the run is asked to stop; None: never.
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
        stop: Stop | None = None,
    ) -> None:
        self._config, self._max_new_tokens = config, max_new_tokens
        self._ledger, self._observer = GroupLedger(config, sampler), observer
        self._rollouts, self._scoring = rollouts, scoring
        self._reference, self._learner = reference, learner
        self._checkpoints, self._stop = checkpoints, stop or Stop()
        self._finite_steps = FiniteSteps(learner, config, self._ledger, observer)
        self._on_policy = config.max_staleness == 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken: asyncio.Future[None]
        self._measuring = Measuring(held_out, config, checkpoints, observer)
        self._conclusion: asyncio.Task[None] | None = None
        self._stats: list[dict[str, float]] = []
        self._discarded_in_a_row = 0
        self._clock = StepClock()
        self._counted_before_step = (0, 0)
        self._last_failure = LoopError("no group has failed")
        self._lost: RoleLostError | None = None
        self._keep_soon = False

    @property
    def result(self) -> LoopResult:
        """Totals so far."""
        return self._ledger.result

    async def run(self) -> LoopResult:
        """Runs to the last step, or to where it is asked to stop; whatever ends it, no task of its own stays behind."""
        await self._stop.unless(self._measuring.begin(self._ledger.buffer.version), None)
        self._sift()
        self._clock = StepClock()
        producer = asyncio.create_task(self._produce(), name="produce")
        trainer = asyncio.create_task(self._train(), name="train")
        stopper = asyncio.create_task(self._stop.wait(), name="stop")
        self._broken = asyncio.get_running_loop().create_future()
        watched: set[asyncio.Future[Any]] = {producer, trainer, stopper, self._broken}
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if stopper in done:
                await self._wind_up(producer, trainer)
            for task in done - {stopper}:
                task.result()
        finally:
            leftover = [*watched, *self._tasks]
            leftover += [task for task in (self._conclusion, self._measuring.task) if task is not None]
            await cancelled(leftover)
        return self.result

    def load_state_dict(self, state: Mapping[str, Any], groups: Sequence[FinishedGroup]) -> None:
        """Goes on where a checkpoint was taken; engines and learners hold the weights of its version."""
        self._ledger.load_state_dict(state, groups, with_reference=self._reference is not None)
        self._counted_before_step = (self.result.discarded, self.result.replaced)

    def keep_soon(self) -> bool:
        """A checkpoint follows the step under way, whichever it is; False where none is kept at all."""
        self._keep_soon = self._checkpoints is not None and self._config.checkpoint_every > 0
        return self._keep_soon

    async def _wind_up(self, producer: asyncio.Task[None], trainer: asyncio.Task[int]) -> None:
        """Lets the learner end its step, and keeps what is there then."""
        producer.cancel()
        async with self._changed:
            self._changed.notify_all()
        await self._keep_last(await trainer)

    async def _keep_last(self, version: int) -> None:
        """Leaves a checkpoint of the last step, where there are checkpoints."""
        if self._checkpoints is not None and self._config.checkpoint_every > 0 and version > 0:
            await self._keep(version)
            await self._checkpoints.close()

    async def _keep(self, version: int) -> None:
        """Writes a checkpoint, which appears after its step was told; returns when training may go on."""
        assert self._checkpoints is not None
        self._keep_soon = False
        await self._checkpoints.save(version, *self._ledger.state_dict(version), self._conclusion)

    # From prompt to buffer.

    async def _produce(self) -> None:
        while True:
            async with self._changed:
                with self._clock.beside("wait_slots"):
                    await self._changed.wait_for(self._may_start_wave)
                wave = self._ledger.start_wave()
            if self._on_policy:
                self._rollouts.together([group_id for group_id, _ in wave], self._config.group_size)
            for group_id, prompt in wave:
                self._spawn(self._roll(group_id, prompt), f"group {group_id}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What a task of its own raises ends the run: nobody else waits for it."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    def _may_start_wave(self) -> bool:
        waits = self._failing() or (self._on_policy and bool(self._ledger.in_flight))
        return not waits and self._ledger.may_start()

    async def _roll(self, group_id: int, prompt: Prompt) -> None:
        """One group from prompt to buffer; one that fails is discarded with its reason, and another takes its place."""
        try:
            group, error = await self._make(group_id, prompt), None
        except Exception as failure:
            group, error = None, failure
        async with self._changed:
            if isinstance(error, RoleLostError):
                self._lost = error  # the group stays, for a resume
            elif group is None:
                self._discard(group_id, prompt, error)
            else:
                self._discarded_in_a_row = 0
                self._ledger.finish(group)
            self._sift()
            self._changed.notify_all()

    async def _make(self, group_id: int, prompt: Prompt) -> FinishedGroup:
        header, payload = await self._rollouts.generate(prompt, group_id, self._config.group_size)
        rewards, (handle, reference) = await asyncio.gather(self._score(payload), self._refer(payload))
        return FinishedGroup(
            header=header, payload=payload, rewards=rewards, reference=handle, reference_header=reference
        )

    async def _score(self, payload: Any) -> GroupRewards:
        with self._clock.asked("reward"):
            return await self._scoring.score(payload)

    async def _refer(self, payload: Any) -> tuple[Any, Any]:
        if self._reference is None:
            return None, None
        with self._clock.asked("reference"):
            return await self._reference.logprobs(payload)

    def _discard(self, group_id: int, prompt: Prompt, error: Exception | None) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._ledger.discard(group_id, reason.splitlines()[0])
        self._discarded_in_a_row += 1
        self._last_failure = LoopError(f"group {group_id}: {error}")
        self._last_failure.__cause__ = error
        self._observer.discarded(group_id, prompt.prompt_id, reason)

    def _sift(self) -> None:
        for group in self._ledger.sift():
            self._observer.replaced(group)

    def _failing(self) -> bool:
        return self._lost is not None or self._discarded_in_a_row >= MAX_DISCARDED_IN_A_ROW

    # From buffer to published weights.

    async def _train(self) -> int:
        """Returns the version that the learner has reached when the run ends or is asked to stop."""
        clock, start = self._clock, self._ledger.buffer.version
        self._stats = await self._measured(start, "the engines' counters", self._rollouts.stats(), [])
        for step in range(start, self._config.steps):
            version, rate = step + 1, self._learning_rate(step)
            taken = groups = await self._take()
            if not taken:
                await self._concluded()
                return step
            clock.lap("wait_groups")
            groups, outcome = await self._finite_steps.take(groups, rate, step)
            clock.lap("train")
            await self._concluded()
            clock.lap("conclude")
            weights, checksum = await self._learner.export(version)
            publication = self._spawn(self._publish(weights, version, checksum), f"publish {version}")
            await self._stop.unless(asyncio.shield(publication), None)
            spent = clock.end("publish")
            if not self._on_policy:
                await self._release(version)
            probe = None if self._stop.requested else await self._probe(groups)
            clock.lap("probe")
            row = outcome.metrics | spent | rollout_metrics(groups, step)
            trained = TrainedStep(step=step, groups=tuple(groups), learning_rate=rate, checksum=checksum, metrics=row)
            self.result.add(step, sum(len(g.group.header.lengths) for g in groups), row, outcome.changed_nothing)
            self._finite_steps.count(groups, outcome)
            self._conclusion = asyncio.create_task(self._conclude(trained, probe), name=f"conclude {step}")
            if self._on_policy or version == self._config.steps or self._stop.requested:
                await self._concluded()
            clock.lap("conclude")
            self._ledger.forget([group.group for group in taken])
            if self._stop.requested:
                return version
            if self._is_kept(version):
                await self._keep(version)
                clock.seconds["checkpoint/blocked_s"] = clock.lap("checkpoint")
            if self._on_policy:
                await self._release(version)
        return self._config.steps

    async def _publish(self, weights: Any, version: int, checksum: int) -> None:
        try:
            await self._rollouts.update_weights(weights, version, checksum)
        except RoleLostError as error:
            self._lost = error  # the step ends as it should before the run does

    def _is_kept(self, version: int) -> bool:
        every = self._config.checkpoint_every
        due = every > 0 and (version % every == 0 or self._keep_soon or self._measuring.is_due(version))
        return self._checkpoints is not None and due and version < self._config.steps

    def _learning_rate(self, step: int) -> float:
        config = self._config
        return linear_decay(step, config.steps, config.learning_rate, config.warmup_steps, config.final_lr_share)

    async def _concluded(self) -> None:
        """Returns when the step before is wholly told of; what was wrong with it is raised here."""
        if self._conclusion is not None:
            task, self._conclusion = self._conclusion, None
            await task
            self._finite_steps.check()

    async def _take(self) -> list[TrainingGroup]:
        """A step's groups with their advantages, once they are there; none where the run is asked to stop."""
        buffer = self._ledger.buffer
        async with self._changed:
            await self._changed.wait_for(lambda: self._stop.requested or buffer.ready() or self._failing())
            if self._stop.requested:
                return []
            if self._lost is not None:
                await self._concluded()
                await self._keep_last(self._ledger.buffer.steps_taken)
                raise self._lost
            if not buffer.ready():
                raise self._last_failure
            taken = self._ledger.take()
        return [with_advantages(group, self._config, self._max_new_tokens) for group in taken]

    async def _release(self, version: int) -> None:
        async with self._changed:
            self._ledger.buffer.published(version)
            self._changed.notify_all()

    async def _probe(self, groups: list[TrainingGroup]) -> Probe | None:
        """The learner's log-probs of a completion under the weights just published; None where all are empty."""
        group = next((each.group for each in groups if max(each.group.header.lengths) > 0), None)
        if group is None:
            return None
        index = int(np.argmax(group.header.lengths))
        return group.payload, index, await self._learner.score(group.payload, index)

    async def _conclude(self, trained: TrainedStep, probe: Probe | None) -> None:
        """What is measured of the weights of a step, beside the next one; on-policy before it, since nothing else may
        then run on the engines."""
        version, metrics = trained.step + 1, dict[str, float]()
        try:
            gap = await self._measured(version, "engines against the learner", engine_gap(self._rollouts, probe), None)
            if gap is not None:
                metrics["sync_gap_max"] = gap
                self.result.logprob_max_abs_diff = max(self.result.logprob_max_abs_diff, gap)
            measured = await self._stop.unless(self._measuring.ready(version), {})
            before = self._stats
            self._stats = await self._measured(version, "the engines' counters", self._rollouts.stats(), before)
            metrics |= measured | role_metrics(before, self._stats, trained.groups, trained.metrics)
        except RoleLostError as error:
            self._lost = error
        self._tell(replace(trained, metrics={**trained.metrics, **metrics}))

    async def _measured(self, version: int, what: str, measurement: Awaitable[T], otherwise: T) -> T:
        """What a measurement gives; `otherwise` where it fails, or a stop is requested."""
        failed = partial(self._observer.unmeasured, version, what)
        return await self._stop.unless(unless_failed(measurement, otherwise, failed), otherwise)

    def _tell(self, trained: TrainedStep) -> None:
        """Tells the observer of a step, with the groups that became none since the one before."""
        result, before = self.result, self._counted_before_step
        self._counted_before_step = (result.discarded, result.replaced)
        metrics = {
            **trained.metrics,
            "groups/discarded": float(result.discarded - before[0]),
            "groups/replaced": float(result.replaced - before[1]),
        }
        self._observer.step(replace(trained, metrics=metrics))
