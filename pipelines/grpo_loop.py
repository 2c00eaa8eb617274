"""The one training loop: synchronous training is the asynchronous one with `max_staleness: 0`.

    sampler -> admit -> generate -> score + reference -> buffer -> train -> publish
                 ^                                                            |
                 +-------------- a slot comes back with the new version ------+

Two tasks share one asyncio loop and one AdmissionBuffer:
    _produce  consumes admissions, produces finished groups; waits for a free slot; a published version unblocks it.
    _train    consumes a step's finished groups, produces a version; waits for them; a finished group unblocks it.
It moves headers and references, never tensors, and knows nothing of medicine, Ray, vLLM or DeepSpeed: its collaborators
are the Protocols below.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.algorithm.advantages import group_advantages, has_signal
from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.rollout.buffer import AdmissionBuffer
from medtvt_rl.types import GroupHeader, LearnerStep, Prompt

MAX_DISCARDED_IN_A_ROW = 8
MAX_SKIPPED_IN_A_ROW = 5


class LoopError(RuntimeError):
    """The loop cannot go on; the message says which group and why."""


class Rollouts(Protocol):
    """The generators."""

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int) -> tuple[GroupHeader, Any]:
        """One group: its header, and a handle to it."""

    async def update_weights(self, weights: Any, version: int, checksum: int) -> None:
        """Every engine holds `version` when this returns."""

    async def score(self, group: Any, index: int) -> list[NDArray[np.float32]]:
        """Log-probs [T] of one completion at temperature 1, of every engine."""


class Scoring(Protocol):
    """The reward scorers."""

    async def score(self, group: Any) -> GroupRewards:
        """Rewards of the group behind a handle."""


class Reference(Protocol):
    """The frozen policy."""

    async def logprobs(self, group: Any) -> tuple[Any, NDArray[np.float32]]:
        """A handle to the reference log-probs of the group, and the KL of each completion, [G]."""


class Learner(Protocol):
    """The learner gang."""

    async def train_step(self, groups: list[TrainingGroup], learning_rate: float, version: int) -> LearnerStep:
        """One optimizer step, or why it changed no weight; the metric `skipped` is then 1."""

    async def export(self, version: int) -> tuple[Any, int]:
        """A handle to the weights of `version`, and their checksum."""

    async def score(self, group: Any, index: int) -> NDArray[np.float32]:
        """Log-probs [T] of one completion at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A group that waits for its step: small things at hand, large ones behind handles."""

    header: GroupHeader
    payload: Any
    rewards: GroupRewards
    reference: Any
    kl: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """A group as the learner gang gets it; advantages are [G] float32."""

    group: FinishedGroup
    advantages: NDArray[np.float32]


@dataclass
class LoopResult:
    """What the loop saw over the whole run."""

    steps: int = 0
    skipped_steps: int = 0
    completions: int = 0
    discarded: int = 0
    max_staleness_seen: int = 0
    logprob_max_abs_diff: float = 0.0
    rewards: list[float] = field(default_factory=list)


class Observer(Protocol):
    """Who is told how the loop goes."""

    def step(self, step: int, metrics: dict[str, float], groups: list[TrainingGroup]) -> None:
        """A step (0-based) was trained on `groups` and published."""

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """A group was given up; the first line of the reason says why."""


class GrpoLoop:
    """Drives generators, scorers, reference and learner until `config.steps` steps are done."""

    def __init__(
        self,
        config: GrpoConfig,
        sampler: PromptSampler,
        rollouts: Rollouts,
        scoring: Scoring,
        reference: Reference | None,
        learner: Learner,
        observer: Observer,
    ) -> None:
        self._config = config
        self._sampler = sampler
        self._rollouts = rollouts
        self._scoring = scoring
        self._reference = reference
        self._learner = learner
        self._observer = observer
        self._buffer: AdmissionBuffer[FinishedGroup] = AdmissionBuffer(config.groups_per_step, config.max_staleness)
        self._changed = asyncio.Condition()
        self._pending: set[asyncio.Task[None]] = set()
        self._discarded_in_a_row = 0
        self._discarded_before_step = 0
        self._skipped_in_a_row = 0
        self._last_failure = LoopError("no group has failed")
        self.result = LoopResult()

    async def run(self) -> LoopResult:
        """Runs to the last step; whatever ends it, no task of its own stays behind."""
        producer = asyncio.create_task(self._produce(), name="produce")
        trainer = asyncio.create_task(self._train(), name="train")
        try:
            done, _ = await asyncio.wait({producer, trainer}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            leftover = [producer, trainer, *self._pending]
            for task in leftover:
                task.cancel()
            await asyncio.gather(*leftover, return_exceptions=True)
        return self.result

    async def _produce(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._may_admit)
                group_id = self._buffer.admit()
            _, _, prompt = self._sampler.next()
            task = asyncio.create_task(self._roll(group_id, prompt), name=f"group {group_id}")
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    def _may_admit(self) -> bool:
        if self._failing():
            return False
        wanted = self._config.steps * self._config.groups_per_step
        counts = self._buffer.counts
        return self._buffer.can_admit() and counts.admitted - counts.discarded < wanted

    async def _roll(self, group_id: int, prompt: Prompt) -> None:
        """One group from prompt to buffer; one that fails is discarded with its reason, and another takes its place."""
        try:
            header, payload = await self._rollouts.generate(prompt, group_id, self._config.group_size)
            scored, reference = await asyncio.gather(self._scoring.score(payload), self._refer(payload))
        except Exception as error:
            await self._discard(group_id, prompt, error)
            return
        group = FinishedGroup(header=header, payload=payload, rewards=scored, reference=reference[0], kl=reference[1])
        async with self._changed:
            self._buffer.finish(group_id, group, header.oldest_version)
            self._discarded_in_a_row = 0
            self._changed.notify_all()

    async def _refer(self, payload: Any) -> tuple[Any, NDArray[np.float32] | None]:
        if self._reference is None:
            return None, None
        return await self._reference.logprobs(payload)

    async def _discard(self, group_id: int, prompt: Prompt, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._observer.discarded(group_id, prompt.prompt_id, reason)
        async with self._changed:
            self._buffer.discard(group_id, reason.splitlines()[0])
            self.result.discarded += 1
            self._discarded_in_a_row += 1
            self._last_failure = LoopError(f"group {group_id}: {error}")
            self._last_failure.__cause__ = error
            self._changed.notify_all()

    async def _train(self) -> None:
        for step in range(self._config.steps):
            started = time.monotonic()
            groups = await self._take()
            waited = time.monotonic()
            metrics = dict((await self._learner.train_step(groups, learning_rate(self._config, step), step)).metrics)
            trained = time.monotonic()
            await self._publish(step + 1)
            published = time.monotonic()
            metrics["sync_gap_max"] = await self._compare(groups[0].group)
            timing = {
                "seconds/wait_groups": waited - started,
                "seconds/train": trained - waited,
                "seconds/publish": published - trained,
                "seconds/compare": time.monotonic() - published,
            }
            self._finish_step(step, groups, {**metrics, **timing})
            self._count_skipped(groups, metrics)

    async def _take(self) -> list[TrainingGroup]:
        """A step's groups with their advantages, once they are there."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._buffer.ready() or self._failing())
            if not self._buffer.ready():
                raise self._last_failure
            taken = [group for _, group in self._buffer.take()]
        return [self._with_advantages(group) for group in taken]

    def _failing(self) -> bool:
        return self._discarded_in_a_row >= MAX_DISCARDED_IN_A_ROW

    def _with_advantages(self, group: FinishedGroup) -> TrainingGroup:
        kl = self._config.loss.kl
        rewards = group.rewards.total
        if group.kl is not None and kl.placement == "reward":
            rewards = rewards - kl.coefficient * group.kl
        return TrainingGroup(group=group, advantages=group_advantages(rewards, self._config.advantage))

    async def _publish(self, version: int) -> None:
        weights, checksum = await self._learner.export(version)
        await self._rollouts.update_weights(weights, version, checksum)
        async with self._changed:
            self._buffer.published(version)
            self._changed.notify_all()

    async def _compare(self, group: FinishedGroup) -> float:
        """Largest difference between learner and engines in the log-probs of one completion, right after a sync."""
        index = int(np.argmax(group.header.lengths))
        if group.header.lengths[index] == 0:
            return 0.0
        own, engines = await asyncio.gather(
            self._learner.score(group.payload, index), self._rollouts.score(group.payload, index)
        )
        gaps = [float(np.abs(own - other).max()) for other in engines]
        return max(gaps) if all(map(math.isfinite, gaps)) else math.inf

    def _finish_step(self, step: int, groups: list[TrainingGroup], metrics: dict[str, float]) -> None:
        result = self.result
        discarded = result.discarded - self._discarded_before_step
        self._discarded_before_step = result.discarded
        metrics = {**metrics, **rollout_metrics(groups, step), "groups/discarded": float(discarded)}
        result.steps = step + 1
        result.completions += sum(len(g.group.header.lengths) for g in groups)
        result.max_staleness_seen = max(result.max_staleness_seen, int(metrics["staleness/max"]))
        result.rewards.append(metrics["reward/total"])
        gaps = (result.logprob_max_abs_diff, metrics["sync_gap_max"], metrics.get("fresh_gap_max", 0.0))
        result.logprob_max_abs_diff = max(gaps)
        self._observer.step(step, metrics, groups)

    def _count_skipped(self, groups: list[TrainingGroup], metrics: dict[str, float]) -> None:
        """Raises LoopError where too many steps in a row changed no weight."""
        skipped = metrics.get("skipped", 0.0) > 0
        self.result.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            ids = ", ".join(str(group.group.header.group_id) for group in groups)
            raise LoopError(
                f"{MAX_SKIPPED_IN_A_ROW} learner steps in a row were skipped because a loss or gradient was not "
                f"finite, the last on groups {ids}; lower grpo.learning_rate"
            )


def learning_rate(config: GrpoConfig, step: int) -> float:
    """Linear warm-up, then linear decay to `final_lr_share` at the last step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = step / max(1, config.steps - 1)
    return config.learning_rate * warm * (1 - (1 - config.final_lr_share) * done)


def rollout_metrics(groups: list[TrainingGroup], version: int) -> dict[str, float]:
    """Rewards by component, lengths, staleness and zero-variance groups of one step."""
    headers = [g.group.header for g in groups]
    rewards = [g.group.rewards for g in groups]
    totals = np.stack([r.total for r in rewards])
    lengths = np.concatenate([h.lengths for h in headers])
    staleness = np.array([version - h.oldest_version for h in headers])
    metrics = {
        "reward/total": float(totals.mean()),
        "reward/deviation": float(totals.std()),
        "reward/failed": float(sum(r.failed.sum() for r in rewards)),
        "groups/zero_variance_share": float(np.mean([not has_signal(total) for total in totals])),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/cut_share": float(sum(h.num_cut for h in headers) / len(lengths)),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
        "seconds/generate_group": float(np.mean([h.generate_s for h in headers])),
    }
    for name in rewards[0].components:
        metrics[f"reward/{name}"] = float(np.mean([r.components[name].mean() for r in rewards]))
    return metrics
