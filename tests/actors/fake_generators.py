"""Fake rollout generators, and a pool of them, for tests of the pool's logic."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from actors.member import Member
from actors.process import Whereabouts
from actors.rollout_pool import RolloutPool
from actors.supervision import Incidents
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.types import GroupHeader, Prompt
from medtvt_rl.weights import WeightBuffer

PROMPT = Prompt(prompt_id="p", token_ids=np.arange(3, dtype=np.int32), item_id=None, ground_truth="")
CHECKSUM = 11


class Method:
    """An actor's method, called by `.remote`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


def header(group_id: int, count: int, generate_s: float = 1.0, finite: bool = True) -> GroupHeader:
    return GroupHeader(
        group_id=group_id,
        prompt_id="p",
        lengths=(1,) * count,
        num_cut=0,
        oldest_version=0,
        newest_version=0,
        generate_s=generate_s,
        finite=finite,
    )


class FakeGenerator:
    """Answers with its name. `fault` is raised instead of every answer, `faults` instead of those of a kind; each gate
    holds calls of a kind back; a call that is under way when the generator is killed ends as Ray ends it. Weights that
    come as a header are of kind "receive". Weights in `missing` went down with their node.
    """

    def __init__(self, name: str) -> None:
        self.name, self.checksum = name, CHECKSUM
        self.fault: Exception | None = None
        self.finite = True
        self.faults: dict[str, Exception] = {}
        self.missing: tuple[Any, ...] = ()
        kinds = ("start", "generate", "update", "score", "merge", "health", "join", "receive")
        self.gates = {kind: asyncio.Event() for kind in kinds}
        for gate in self.gates.values():
            gate.set()
        self.dead = asyncio.Event()
        self.groups: list[int] = []
        self.waves: list[Any] = []
        self.parts: list[tuple[int, int, int]] = []
        self.versions: list[int] = []
        self.loaded: list[str] = []
        self.joined: list[tuple[Any, int]] = []
        self.broken: str | None = None
        self.where: Whereabouts | None = None
        self.start = Method(lambda: self._answer("start", self.where))
        self.generate = Method(self._generate)
        self.merge = Method(self._merge)
        self.update_weights = Method(self._update)
        self.join_weight_group = Method(self._join)
        self.health = Method(lambda: self._answer("health", {"ok": self.broken is None, "broken": self.broken}))
        self.score = Method(lambda group, index: self._answer("score", np.zeros(2)))
        self.stats = Method(lambda: self._answer("score", {"tokens_generated": 1.0}))

    def _generate(
        self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool, first_index: int, wave: Any
    ) -> tuple[Awaitable[Any], str]:
        self.groups.append(group_id)
        self.waves.append(wave)
        self.parts.append((group_id, first_index, num_completions))
        made = f"{first_index}..{first_index + num_completions} of {self.name}"
        return self._answer("generate", header(group_id, num_completions, finite=self.finite)), made

    def _merge(self, generate_s: float, *parts: str) -> tuple[Awaitable[Any], str]:
        return self._answer("merge", header(0, 0, generate_s)), " + ".join(parts)

    def _update(self, weights: object, version: int) -> Awaitable[int]:
        self.versions.append(version)
        kind = "receive" if isinstance(weights, WeightBuffer) else "update"
        self.loaded.append(kind)
        if weights in self.missing:
            lost = RayTaskError("update_weights", "traceback", ObjectLostError("0", b"", ""))
            return self._raise(lost.as_instanceof_cause())
        return self._answer(kind, self.checksum)

    def _join(self, group: Any, rank_offset: int) -> Awaitable[None]:
        self.joined.append((group, rank_offset))
        return self._answer("join", None)

    async def _raise(self, error: Exception) -> int:
        raise error

    async def _answer(self, kind: str, value: Any) -> Any:
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gates[kind], self.dead)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.dead.is_set():
            raise ActorDiedError
        if (fault := self.faults.get(kind, self.fault)) is not None:
            raise fault
        return value


class Cast:
    """A pool of fake generators: `first` those it starts with, `successors` by index in order of their start.

    Attributes:
        prepare: what is done to a successor before it is handed out.
        told: what the pool reported.
    """

    def __init__(self, tmp_path: Path, count: int, replace: bool = True, **settings: Any) -> None:
        config = Config(run=RunConfig(name="r", root=str(tmp_path)))
        config.rollout.balance = "even"
        for name, value in settings.items():
            setattr(config.rollout if hasattr(config.rollout, name) else config.supervision, name, value)
        self.first = [FakeGenerator(f"g{i}") for i in range(count)]
        self.successors: dict[int, list[FakeGenerator]] = {i: [] for i in range(count)}
        self.prepare: Callable[[FakeGenerator], None] = lambda generator: None
        self.told: list[str] = []
        self.incidents = Incidents(self.told.append)
        renew = self._renew if replace else None
        members = [Member(index=index, handle=handle) for index, handle in enumerate(self.first)]
        self.pool = RolloutPool(config, members, self.incidents, renew, lambda handle: handle.dead.set())

    def _renew(self, index: int) -> FakeGenerator:
        successor = FakeGenerator(f"g{index}.{len(self.successors[index]) + 1}")
        self.prepare(successor)
        self.successors[index].append(successor)
        return successor

    async def settle(self) -> None:
        """Lets everything run that can."""
        for _ in range(200):
            await asyncio.sleep(0)
