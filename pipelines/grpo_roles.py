"""What the GRPO loop asks of its collaborators, and the records that pass between them.

Owns: the Protocols of generators, scorers, reference, learner, held-out measurement and observer; FinishedGroup,
TrainingGroup, TrainedStep, LoopResult; LoopError. Does not own: any implementation. Nothing here knows medicine, Ray,
vLLM or DeepSpeed; payloads are opaque handles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import GroupHeader, LearnerStep, Prompt, ReferenceHeader


class LoopError(RuntimeError):
    """The loop cannot go on; the message says which group and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A group that waits for its step: small things at hand, large ones behind handles."""

    header: GroupHeader
    payload: Any
    rewards: GroupRewards
    reference: Any
    reference_header: ReferenceHeader | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """A group as the learner gang gets it; advantages are [G] float32."""

    group: FinishedGroup
    advantages: NDArray[np.float32]

    @property
    def group_id(self) -> int:
        """Of the group behind it."""
        return self.group.header.group_id


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedStep:
    """A step that was trained on and published.

    Attributes:
        step: from 0; its weights are version step + 1.
        groups: in the order in which the learner got them.
        checksum: of the exported weights.
    """

    step: int
    groups: tuple[TrainingGroup, ...]
    learning_rate: float
    checksum: int
    metrics: dict[str, float]


@dataclass
class LoopResult:
    """What the loop saw over the whole run."""

    steps: int = 0
    skipped_steps: int = 0
    completions: int = 0
    empty_completions: int = 0
    one_token_completions: int = 0
    unscored_completions: int = 0
    discarded: int = 0
    replaced: int = 0
    nonfinite: int = 0
    max_staleness_seen: int = 0
    logprob_max_abs_diff: float = 0.0
    rewards: list[float] = field(default_factory=list)

    def add(self, step: int, num_completions: int, metrics: Mapping[str, float], skipped: bool) -> None:
        """One step more, by its metrics."""
        self.steps = step + 1
        self.skipped_steps += skipped
        self.completions += num_completions
        self.empty_completions += int(metrics["length/empty"])
        self.one_token_completions += int(metrics["length/one_token"])
        self.unscored_completions += int(metrics["reward/failed"])
        self.max_staleness_seen = max(self.max_staleness_seen, int(metrics["staleness/max"]))
        self.rewards.append(metrics["reward/total"])
        self.logprob_max_abs_diff = max(self.logprob_max_abs_diff, metrics.get("fresh_gap_max", 0.0))


class Rollouts(Protocol):
    """The generators."""

    def together(self, group_ids: Sequence[int], num_completions: int) -> None:
        """These groups are asked for next; an engine begins with its share when all of it is there, in id order."""

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int) -> tuple[GroupHeader, Any]:
        """One group: its header, and a handle to it."""

    async def update_weights(self, weights: Any, version: int, checksum: int) -> None:
        """Every engine holds `version` when this returns."""

    async def score(self, group: Any, index: int) -> list[NDArray[np.float32]]:
        """Log-probs [T] of one completion at temperature 1, of every engine."""

    async def stats(self) -> list[dict[str, float]]:
        """Of each engine, since its start: tokens_generated, busy_s, idle_s; `generator` is its number."""


class Scoring(Protocol):
    """The reward scorers."""

    async def score(self, group: Any) -> GroupRewards:
        """Rewards of the group behind a handle."""


class Reference(Protocol):
    """The frozen policy."""

    async def logprobs(self, group: Any) -> tuple[Any, ReferenceHeader]:
        """A handle to the reference log-probs of the group, and what the driver sees of them."""


class Learner(Protocol):
    """The learner gang."""

    async def train_step(self, groups: list[TrainingGroup], learning_rate: float, version: int) -> LearnerStep:
        """One step of one or more updates; it ends before one that is not finite, and names the groups that caused
        it."""

    async def export(self, version: int) -> tuple[Any, int]:
        """A handle to the weights of `version`, and their checksum."""

    async def score(self, group: Any, index: int) -> NDArray[np.float32]:
        """Log-probs [T] of one completion at temperature 1."""


class Checkpoints(Protocol):
    """Where a run keeps what it goes on from."""

    measuring: int | None
    """The version that waits for its held-out score, and stays until then."""

    async def save(
        self,
        version: int,
        state: dict[str, Any],
        groups: Sequence[FinishedGroup],
        told: asyncio.Future[None] | None = None,
    ) -> None:
        """Keeps the learners' state of `version`, that of the loop and the groups that wait, whole or not at all, not
        before `told` is done: by then the journal has the step. Where `told` fails, none is kept.

        Returns when training may go on; the one before is then written. Where that is of `version`, too, it stays
        as it is."""

    async def close(self) -> None:
        """Returns when none is being written, and all scores are noted."""

    def scored(self, metrics: Mapping[str, float]) -> None:
        """Held-out answers of the version `held_out/version` were measured; empty where that failed."""


class HeldOut(Protocol):
    """Held-out answers of the engines' present policy."""

    async def measure(self) -> dict[str, float]:
        """Metrics by name."""


class Observer(Protocol):
    """Who is told how the loop goes."""

    def step(self, trained: TrainedStep) -> None:
        """A step was trained on and published."""

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        """A group was given up; the first line of the reason says why."""

    def replaced(self, group: FinishedGroup) -> None:
        """A group of equal rewards made way for another."""

    def nonfinite(self, step: int, groups: Sequence[TrainingGroup], reason: str, updates: int) -> None:
        """A step was not finite because of these groups. It is tried again without them, unless it has taken so many
        updates with them."""

    def measured(self, metrics: Mapping[str, float]) -> None:
        """Held-out answers of a version were measured, too late for the row of a step of their own."""

    def unmeasured(self, version: int, what: str, error: Exception) -> None:
        """What should have been measured of a version was not."""
