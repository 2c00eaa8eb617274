"""The rollout generators as the driver sees them: one object that generates groups and takes new weights.

Owns: which generator gets the next group, and that every engine holds the version it was sent. Does not own: admission
(medtvt_rl/rollout/buffer.py), the engines (actors/rollout_generator.py).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.deadline import within
from actors.placement import Placement
from actors.rollout_generator import RolloutGenerator
from medtvt_rl.config import Config
from medtvt_rl.types import GroupHeader, Prompt


class WeightSyncError(RuntimeError):
    """An engine holds other weights than it was sent."""


class RolloutPool:
    """All rollout generators of a run."""

    def __init__(self, config: Config, generators: list[Any]) -> None:
        self._config = config.rollout
        self._generators = generators
        self._load = [0] * len(generators)

    @classmethod
    async def start(cls, config: Config, placement: Placement, model_folder: Path) -> RolloutPool:
        """Starts every generator in its bundle and waits until its engine has loaded `model_folder`."""
        actor: Any = RolloutGenerator
        generators = [
            actor.options(**placement.options("rollout", index)).remote(str(model_folder), config, index)
            for index in range(config.rollout.num_generators)
        ]
        pool = cls(config, generators)
        await asyncio.gather(
            *(
                within(
                    generator.start.remote(),
                    config.rollout.start_timeout_s,
                    f"rollout {index} to load {model_folder}",
                    "rollout.start_timeout_s",
                )
                for index, generator in enumerate(generators)
            )
        )
        return pool

    async def generate(
        self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool = False
    ) -> tuple[GroupHeader, ray.ObjectRef]:
        """One group from the generator with the fewest completions under way: its header, and a reference to it."""
        index = min(range(len(self._load)), key=self._load.__getitem__)
        self._load[index] += num_completions
        try:
            header, payload = self._generators[index].generate.remote(prompt, group_id, num_completions, greedy)
            answer = await within(
                header,
                self._config.generate_timeout_s,
                f"rollout {index} to generate group {group_id}",
                "rollout.generate_timeout_s",
            )
            return answer, payload
        finally:
            self._load[index] -= num_completions

    async def update_weights(self, weights: ray.ObjectRef, version: int, checksum: int) -> None:
        """Publishes one version to every engine. Raises WeightSyncError if one reports another checksum."""
        held = await asyncio.gather(
            *(
                within(
                    generator.update_weights.remote(weights, version),
                    self._config.update_timeout_s,
                    f"rollout {index} to load weights of version {version}",
                    "rollout.update_timeout_s",
                )
                for index, generator in enumerate(self._generators)
            )
        )
        wrong = [index for index, found in enumerate(held) if found != checksum]
        if wrong:
            raise WeightSyncError(
                f"rollout {wrong} hold checksum {[held[i] for i in wrong]} of version {version}, sent {checksum}"
            )

    async def score(self, group: ray.ObjectRef, index: int) -> list[NDArray[np.float32]]:
        """Log-probs [T] of one completion at temperature 1, of every engine."""
        return list(
            await asyncio.gather(
                *(
                    within(
                        generator.score.remote(group, index),
                        self._config.generate_timeout_s,
                        f"rollout {engine} to score a completion",
                        "rollout.generate_timeout_s",
                    )
                    for engine, generator in enumerate(self._generators)
                )
            )
        )

    async def stats(self) -> list[dict[str, float]]:
        """Each engine's counters (tokens, busy and idle seconds)."""
        return list(
            await asyncio.gather(
                *(
                    within(
                        g.stats.remote(),
                        self._config.update_timeout_s,
                        f"rollout {i}'s statistics",
                        "rollout.update_timeout_s",
                    )
                    for i, g in enumerate(self._generators)
                )
            )
        )

    def stop(self) -> None:
        """Ends every generator."""
        for generator in self._generators:
            ray.kill(generator)
