"""The reward scorers and the reference policies as the driver sees them: each a pool that is asked in turn.

Owns: whose turn it is, deadlines, the words of a failure, and a new scorer in place of one that hangs or died. Does not
own: rewards and log-probs (actors/reward_scorer.py, actors/reference_policy.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.deadline import DeadlineError, within
from actors.failure import ActorError, cause_of, with_log
from actors.placement import Placement
from actors.reference_policy import ReferencePolicy
from actors.reward_scorer import RewardScorer
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import ReferenceHeader


class ScorerPool:
    """The reward scorers.

    Args:
        start_scorer: starts the scorer of an index and returns its handle; called again for one that hangs or died.
        kill: ends the process behind a handle.
    """

    def __init__(
        self,
        config: Config,
        start_scorer: Callable[[int], Any],
        kill: Callable[[Any], None],
        timeline: Timeline | None = None,
    ) -> None:
        self._config, self._start_scorer, self._kill = config, start_scorer, kill
        self._timeline = timeline or Timeline()
        self._scorers = [start_scorer(index) for index in range(config.num_scorers)]
        self._turn = count()

    @classmethod
    async def start(
        cls, config: Config, placement: Placement, model_folder: Path, timeline: Timeline | None = None
    ) -> ScorerPool:
        """Starts every scorer in its bundle; returns when all have their tokenizer and reward functions."""
        actor: Any = RewardScorer
        pool = cls(
            config,
            lambda index: actor.options(**placement.options("reward", index)).remote(config, str(model_folder), index),
            ray.kill,
            timeline,
        )
        await _ready(config, "reward", pool._scorers)
        return pool

    async def score(self, group: ray.ObjectRef) -> GroupRewards:
        """Rewards of one group.

        A scorer that hangs or dies is started again and the error raised; groups that waited behind it go to the new
        one.
        """
        index = next(self._turn) % len(self._scorers)
        while True:
            scorer = self._scorers[index]
            try:
                with self._timeline.span(f"reward {index}", "score a group"):
                    return await _score(self._config, "reward", index, scorer.score.remote(group))
            except (DeadlineError, ActorError) as error:
                if self._scorers[index] is not scorer:
                    continue
                if isinstance(error, DeadlineError) or isinstance(error.__cause__, RayActorError):
                    self._kill(scorer)
                    self._scorers[index] = self._start_scorer(index)
                raise


class ReferencePool:
    """The reference policies."""

    def __init__(self, config: Config, references: list[Any], timeline: Timeline | None = None) -> None:
        self._config, self._references = config, references
        self._timeline = timeline or Timeline()
        self._turn = count()

    @classmethod
    async def start(
        cls, config: Config, placement: Placement, model_folder: Path, timeline: Timeline | None = None
    ) -> ReferencePool:
        """Starts every reference in its bundle; returns when all have loaded `model_folder`."""
        actor: Any = ReferencePolicy
        references = [
            actor.options(**placement.options("reference", index)).remote(str(model_folder), config, index)
            for index in range(config.num_references)
        ]
        await _ready(config, "reference", references)
        return cls(config, references, timeline)

    async def logprobs(self, group: ray.ObjectRef) -> tuple[ray.ObjectRef, ReferenceHeader]:
        """A reference to the log-probs of one group, and what the driver sees of them."""
        index = next(self._turn) % len(self._references)
        header, payload = self._references[index].logprobs.remote(group)
        with self._timeline.span(f"reference {index}", "score a group"):
            return payload, await _score(self._config, "reference", index, header)


async def _ready(config: Config, role: str, actors: list[Any]) -> None:
    """Returns when every actor is constructed."""
    timeout_s, setting = config.rollout.start_timeout_s, "rollout.start_timeout_s"
    await asyncio.gather(
        *(
            _answer(config, role, index, actor.ready.remote(), "start", timeout_s, setting)
            for index, actor in enumerate(actors)
        )
    )


async def _score(config: Config, role: str, index: int, answer: Awaitable[Any]) -> Any:
    return await _answer(config, role, index, answer, "score a group", config.score_timeout_s, "score_timeout_s")


async def _answer(
    config: Config, role: str, index: int, answer: Awaitable[Any], what: str, timeout_s: float, setting: str
) -> Any:
    """Raises DeadlineError or ActorError with the actor's name and the end of its log."""
    log = config.folder / "logs" / f"{role}_{index}.log"
    try:
        return await within(answer, timeout_s, f"{role} {index} to {what}", setting)
    except DeadlineError as error:
        raise DeadlineError(with_log(str(error), log)) from error
    except RayError as error:
        raise ActorError(with_log(f"{role} {index}, asked to {what}: {cause_of(error)}", log)) from error
