"""What is measured of a published version: held-out answers, now and then, and the engines against the learner.

Training hangs on none of it: what fails is told. Only where a role has no actor left does the run end.

Owns: the one measurement of held-out answers under way, and who is told what it found: the checkpoints as soon as it is
there, the row of a step or one of its own. Does not own: how it is made (held_out.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.faults import RoleLostError
from pipelines.grpo_roles import Checkpoints, HeldOut, Observer, Rollouts

T = TypeVar("T")
Probe = tuple[Any, int, NDArray[np.float32]]
"""A group's handle, a completion of it, and the learner's log-probs of that."""


async def engine_gap(rollouts: Rollouts, probe: Probe | None) -> float | None:
    """Largest difference between learner and engines in the log-probs of a probe; infinite where one is not finite,
    None without a probe."""
    if probe is None:
        return None
    payload, index, own = probe
    gaps = [float(np.abs(own - other).max()) for other in await rollouts.score(payload, index)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


async def unless_failed(measurement: Awaitable[T], otherwise: T, tell: Callable[[Exception], None]) -> T:
    """What a measurement gives, or `otherwise` where it fails, which is told."""
    try:
        return await measurement
    except RoleLostError:
        raise
    except Exception as error:
        tell(error)
        return otherwise


class Measuring:
    """Starts measurements and hands out their results.

    Args:
        held_out: None measures nothing.
        config: on-policy nothing else may run on the engines meanwhile, so that each measurement is waited for.
        checkpoints: told the score of each.
        observer: told of one that fails, and of one that finds no place in the row of a step.
    """

    def __init__(
        self, held_out: HeldOut | None, config: GrpoConfig, checkpoints: Checkpoints | None, observer: Observer
    ) -> None:
        self._held_out, self._every, self._last = held_out, config.held_out.every_steps, config.steps
        self._alone = config.max_staleness == 0
        self._checkpoints, self._observer = checkpoints, observer
        self.task: asyncio.Task[dict[str, float]] | None = None

    def is_due(self, version: int) -> bool:
        """Whether a version is measured, if the engines are free for it."""
        return self._held_out is not None and self._every > 0 and version % self._every == 0

    async def begin(self, version: int) -> None:
        """Measures the policy that the run starts with."""
        self._start(version)
        if self._alone and self.task is not None:
            await asyncio.wait({self.task})

    async def ready(self, version: int) -> dict[str, float]:
        """What was found since the last call, for the row of the step that published a version; starts a measurement of
        that version where it is due and none is under way."""
        last = version == self._last
        found = await self._collect(wait=last)  # an earlier one that is late makes way for the last
        if self.is_due(version) or last:
            self._start(version)
        wait = self._alone or last
        if found and wait and self.task is not None:
            self._observer.measured(found)  # the row is that of the newer one
            found = {}
        return await self._collect(wait) or found

    async def _collect(self, wait: bool) -> dict[str, float]:
        if self.task is None or not (wait or self.task.done()):
            return {}
        task, self.task = self.task, None
        return await task

    def _start(self, version: int) -> None:
        if self._held_out is not None and self._every > 0 and self.task is None:
            if self._checkpoints is not None:
                self._checkpoints.measuring = version
            self.task = asyncio.create_task(self._measure(self._held_out, version), name=f"held-out {version}")

    async def _measure(self, held_out: HeldOut, version: int) -> dict[str, float]:
        failed = partial(self._observer.unmeasured, version, "held-out answers")
        found = await unless_failed(held_out.measure(), None, failed)
        metrics: dict[str, float] = {}
        if found is not None:
            metrics = {f"held_out/{name}": value for name, value in found.items()}
            metrics["held_out/version"] = float(version)
        if self._checkpoints is not None:
            self._checkpoints.scored(metrics)
            self._checkpoints.measuring = None
        return metrics
