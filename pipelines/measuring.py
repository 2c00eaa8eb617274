"""What is measured of a published version: held-out answers, now and then, and the engines against the learner.

Training hangs on none of it: what fails is told. Only where a role has no actor left does the run end.

Owns: the one measurement of held-out answers under way. Does not own: how it is made (held_out.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.algorithm.config import HeldOutConfig
from medtvt_rl.faults import RoleLostError
from pipelines.grpo_roles import HeldOut, Rollouts

T = TypeVar("T")
Probe = tuple[Any, int, NDArray[np.float32]]
"""A group's handle, a completion of it, and the learner's log-probs of that."""


async def engine_gap(rollouts: Rollouts, probe: Probe | None) -> float:
    """Largest difference between learner and engines in the log-probs of a probe; infinite where one is not finite."""
    if probe is None:
        return 0.0
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
        failed: f(version, what, error) is told of one that fails.
        held_out: None measures nothing.
        last: the run's last version.
        alone: nothing else may run on the engines meanwhile, so that each measurement is waited for.
    """

    def __init__(
        self,
        held_out: HeldOut | None,
        settings: HeldOutConfig,
        last: int,
        alone: bool,
        failed: Callable[[int, str, Exception], None],
    ) -> None:
        self._held_out, self._settings, self._last, self._alone = held_out, settings, last, alone
        self._failed = failed
        self.task: asyncio.Task[dict[str, float]] | None = None

    def is_due(self, version: int) -> bool:
        """Whether a version is measured, if the engines are free for it."""
        every = self._settings.every_steps
        return self._held_out is not None and every > 0 and version % every == 0

    async def begin(self, version: int) -> None:
        """Measures the policy that the run starts with."""
        self._start(version)
        if self._alone and self.task is not None:
            await asyncio.wait({self.task})

    async def ready(self, version: int) -> dict[str, float]:
        """The metrics that are ready when a version was published; starts their measurement where it is due."""
        last = version == self._last
        if last and self.task is not None:
            await self.task  # an earlier one that is late makes way for the last
            self.task = None
        if self.is_due(version) or last:
            self._start(version)
        if self.task is not None and (self._alone or last or self.task.done()):
            task, self.task = self.task, None
            return await task
        return {}

    def _start(self, version: int) -> None:
        if self._held_out is not None and self._settings.every_steps > 0 and self.task is None:
            self.task = asyncio.create_task(self._measure(self._held_out, version), name=f"held-out {version}")

    async def _measure(self, held_out: HeldOut, version: int) -> dict[str, float]:
        found = await unless_failed(held_out.measure(), None, partial(self._failed, version, "held-out answers"))
        if found is None:
            return {}
        return {f"held_out/{name}": value for name, value in found.items()} | {"held_out/version": float(version)}
