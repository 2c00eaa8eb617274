"""The rollout generators as the driver sees them: one object that generates groups and takes new weights.

Owns: which generator gets the next group, that every engine holds the version it was sent, and that one whose actor
died or whose engine broke gets no more work. Does not own: admission (medtvt_rl/rollout/buffer.py), the engines
(actors/rollout_generator.py), or a new generator in place of a lost one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError

from actors.deadline import within
from actors.failure import ActorError, cause_of, with_log
from actors.placement import Placement
from actors.rollout_generator import RolloutGenerator
from medtvt_rl.config import Config
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.types import GroupHeader, Prompt

logger = logging.getLogger(__name__)


class WeightSyncError(RuntimeError):
    """An engine holds other weights than it was sent."""


class GeneratorLostError(ActorError):
    """A generator is gone for good: its actor died, or its engine broke."""


class RolloutPool:
    """All rollout generators of a run.

    Args:
        generators: handles; the place of each is its index among its kind.
        report: told in one line when a generator is lost.

    Every method raises GeneratorLostError when no generator is left, with the cause and the end of the log of each.
    """

    def __init__(self, config: Config, generators: list[Any], report: Callable[[str], None] = logger.warning) -> None:
        self._config = config.rollout
        self._logs = config.folder / "logs"
        self._generators = dict(enumerate(generators))
        self._load = dict.fromkeys(self._generators, 0)
        self._lost: dict[int, GeneratorLostError] = {}
        self._report = report

    @classmethod
    async def start(
        cls,
        config: Config,
        placement: Placement,
        model_folder: Path,
        report: Callable[[str], None] = logger.warning,
    ) -> RolloutPool:
        """Starts every generator in its bundle and waits until its engine has loaded `model_folder`."""
        actor: Any = RolloutGenerator
        generators = [
            actor.options(**placement.options("rollout", index)).remote(str(model_folder), config, index)
            for index in range(placement.count("rollout"))
        ]
        pool = cls(config, generators, report)
        what, timeout_s = f"load {model_folder}", config.rollout.start_timeout_s
        await asyncio.gather(
            *(
                pool._ask(index, generator.start.remote(), what, timeout_s, "rollout.start_timeout_s")
                for index, generator in enumerate(generators)
            )
        )
        return pool

    @property
    def num_left(self) -> int:
        """Generators that serve."""
        return len(self._generators)

    async def generate(
        self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool = False
    ) -> tuple[GroupHeader, ray.ObjectRef]:
        """One group from the generator with the fewest completions under way: its header, and a reference to it.

        A group whose generator is lost goes once to another one, with the same seeds. Once only: it may be the group
        that breaks engines.
        """
        for attempt in range(2):
            self._require_one()
            index = min(self._generators, key=self._load.__getitem__)
            self._load[index] += num_completions
            try:
                header, payload = self._generators[index].generate.remote(prompt, group_id, num_completions, greedy)
                what, timeout_s = f"generate group {group_id}", self._config.generate_timeout_s
                return await self._ask(index, header, what, timeout_s, "rollout.generate_timeout_s"), payload
            except GeneratorLostError:
                if attempt:
                    raise
            finally:
                self._load[index] -= num_completions
        raise AssertionError("the second attempt returns or raises")

    async def update_weights(self, weights: ray.ObjectRef, version: int, checksum: int) -> None:
        """Publishes one version to every engine. Raises WeightSyncError if one reports another checksum."""
        held = await self._everywhere(
            lambda generator: generator.update_weights.remote(weights, version),
            f"load weights of version {version}",
            self._config.update_timeout_s,
            "rollout.update_timeout_s",
        )
        wrong = {index: found for index, found in held.items() if found != checksum}
        if wrong:
            raise WeightSyncError(
                f"rollout {list(wrong)} hold checksum {list(wrong.values())} of version {version}, sent {checksum}"
            )

    async def score(self, group: ray.ObjectRef, index: int) -> list[NDArray[np.float32]]:
        """Log-probs [T] of one completion at temperature 1, of every engine."""
        scored = await self._everywhere(
            lambda generator: generator.score.remote(group, index),
            "score a completion",
            self._config.generate_timeout_s,
            "rollout.generate_timeout_s",
        )
        return list(scored.values())

    async def stats(self) -> list[dict[str, float]]:
        """Each engine's counters (tokens, busy and idle seconds)."""
        found = await self._everywhere(
            lambda generator: generator.stats.remote(),
            "give its statistics",
            self._config.update_timeout_s,
            "rollout.update_timeout_s",
        )
        return list(found.values())

    def stop(self) -> None:
        """Ends every generator."""
        for generator in self._generators.values():
            ray.kill(generator)

    async def _everywhere(
        self, call: Callable[[Any], Awaitable[Any]], what: str, timeout_s: float, setting: str
    ) -> dict[int, Any]:
        """Answers by index of the generators that are left when all have answered."""
        self._require_one()
        asked = list(self._generators)
        answers = await asyncio.gather(
            *(self._ask(index, call(self._generators[index]), what, timeout_s, setting) for index in asked),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, GeneratorLostError):
                raise answer
        self._require_one()
        return {index: answer for index, answer in zip(asked, answers) if not isinstance(answer, BaseException)}

    async def _ask(self, index: int, answer: Awaitable[Any], what: str, timeout_s: float, setting: str) -> Any:
        """Raises GeneratorLostError and drops the generator where it is gone; ActorError where the call failed."""
        who = f"rollout {index}"
        try:
            return await within(answer, timeout_s, f"{who} to {what}", setting)
        except (RayActorError, EngineBrokenError) as error:
            raise self._drop(index, error) from error
        except RayTaskError as error:
            raise ActorError(f"{who}, asked to {what}: {cause_of(error)}") from error

    def _drop(self, index: int, error: Exception) -> GeneratorLostError:
        """Takes a generator out of rotation, and says so once."""
        if index not in self._lost:
            lost = f"rollout {index} is lost: {cause_of(error)}"
            self._lost[index] = GeneratorLostError(with_log(lost, self._logs / f"rollout_{index}.log"))
            del self._generators[index]
            self._report(f"{lost}; {len(self._generators)} left")
        return self._lost[index]

    def _require_one(self) -> None:
        if not self._generators:
            causes = "\n".join(str(lost) for lost in self._lost.values())
            raise GeneratorLostError(f"no rollout generator is left; {causes}")
