"""The generators of a simulated run as the loop sees them: who gets a group, publications, losses, members that come
and go.

Owns: asking whoever's turn it is, the versions that serve, the cost of the driver's calls. Does not own: whose turn it
is (medtvt_rl/rollout/balance.py, as in a real run), what an engine does with a group (engine.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.config import Config
from medtvt_rl.rollout.balance import Balance
from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.engine import GoneError, SimulatedEngine
from medtvt_rl.simulation.timings import Timings
from medtvt_rl.simulation.world import Setting
from medtvt_rl.types import GroupHeader, Prompt

NO_LOGPROBS = np.zeros(1, dtype=np.float32)


class Driver:
    """The one process that asks and is answered: its calls follow each other."""

    def __init__(self, timings: Timings, cores: Cores) -> None:
        self._timings, self._cores = timings, cores
        self._turn = asyncio.Lock()
        self.busy_s = 0.0
        self._loop = asyncio.get_running_loop()

    async def call(self) -> None:
        """Asks an actor; the way to it and back."""
        async with self._turn:
            began = self._loop.time()
            await self._cores.run(self._timings.driver_call_s)
            self.busy_s += self._loop.time() - began
        await asyncio.sleep(self._timings.answer_s)


class SimulatedGenerators:
    """The Rollouts of the loop. Handles of groups are (completion lengths, prompt tokens).

    Attributes:
        on_published: called when all engines hold a new version.
        again: groups that were asked for once more, because their generator was lost.
        serving: (time, generators that serve) at every change.
    """

    def __init__(
        self, config: Config, setting: Setting, timings: Timings, cores: Cores, driver: Driver, seed: int = 0
    ) -> None:
        self._config, self._setting, self._timings = config, setting, timings
        self._cores, self._driver = cores, driver
        self._link = Cores(1.0)
        self._random = np.random.default_rng(seed)
        self._loop = asyncio.get_running_loop()
        self._engines: dict[int, SimulatedEngine] = {}
        self._load: Counter[int] = Counter()
        self._balance = Balance(config.rollout.by_speed(config.grpo.max_staleness), self._loop.time)
        self._seats: dict[int, int] = {}
        self._come = asyncio.Event()
        self._version = 0
        self._next = 0
        self._slowness = 1.0
        self._gone: list[SimulatedEngine] = []
        self.starting = 0
        self.on_published: Callable[[], None] = lambda: None
        self.again = 0
        self.serving: list[tuple[float, int]] = []
        for index in range(setting.generators):
            self._engines[index] = self._engine(index)
            self._next = index + 1
        self._count_changed()

    def _engine(self, index: int) -> SimulatedEngine:
        rollout, last = self._config.rollout, self._setting.generators - 1
        return SimulatedEngine(
            self._timings,
            self._cores,
            rollout.engine.max_num_seqs,
            rollout.on_update,
            self._setting.straggler if index == last else self._slowness,
            rollout.engine.num_threads if self._setting.cores != float("inf") else 1.0,
        )

    # As the loop sees them.

    def together(self, group_ids: Sequence[int], num_completions: int) -> None:
        """Settles who makes these; each engine begins with its share as a whole."""
        load = self._loads()
        for group_id in group_ids:
            for index in self._balance.order(load, num_completions)[:1]:
                load[index] += num_completions
                self._seats[group_id] = index
                self._engines[index].expect(1)

    def _loads(self) -> dict[int, int]:
        return {index: self._load[index] for index in self._engines}

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int) -> tuple[GroupHeader, Any]:
        """A group of one of the measured ones' lengths, from the generator whose turn it is."""
        began = self._loop.time()
        row = self._timings.lengths[int(self._random.integers(len(self._timings.lengths)))]
        lengths = tuple(int(length) for length in self._random.choice(row, num_completions))
        prompt_tokens = self._timings.prompt_tokens
        oldest, newest = await self._ask(lengths, prompt_tokens, num_completions, self._seats.pop(group_id, None))
        header = GroupHeader(
            group_id=group_id,
            prompt_id=prompt.prompt_id,
            lengths=lengths,
            num_cut=0,
            oldest_version=oldest,
            newest_version=newest,
            generate_s=self._loop.time() - began,
        )
        return header, (lengths, prompt_tokens)

    async def _ask(
        self, lengths: tuple[int, ...], prompt_tokens: float, load: int, first: int | None
    ) -> tuple[int, int]:
        while True:
            while not self._engines:
                self._come.clear()
                await self._come.wait()
            index = first if first in self._engines else self._balance.order(self._loads(), load)[0]
            first, tokens = None, 0
            engine = self._engines[index]
            self._load[index] += load
            self._balance.begin(index)
            try:
                await self._driver.call()
                versions = await engine.generate(lengths, prompt_tokens)
                tokens = sum(lengths)
                return versions
            except GoneError:
                self.again += 1
            finally:
                self._load[index] -= load
                self._balance.end(index, tokens)

    async def update_weights(self, weights: Any, version: int, checksum: int) -> None:
        """Returns when every engine that serves holds the version."""
        self._version = version
        await asyncio.gather(*(self._send(engine, version) for engine in list(self._engines.values())))
        self.on_published()

    async def _send(self, engine: SimulatedEngine, version: int) -> None:
        await self._driver.call()
        await self._link.run(self._timings.weight_bytes / self._setting.bytes_per_s)
        try:
            await engine.update(version)
        except GoneError:
            return

    async def score(self, group: Any, index: int) -> list[NDArray[np.float32]]:
        """The probe after a publication: a prefill of prompt and completion on every engine."""
        lengths, prompt_tokens = group

        async def one(engine: SimulatedEngine) -> None:
            await self._driver.call()
            try:
                await engine.generate((0,), prompt_tokens + lengths[index])
            except GoneError:
                return

        await asyncio.gather(*(one(engine) for engine in list(self._engines.values())))
        return [NO_LOGPROBS]

    async def stats(self) -> list[dict[str, float]]:
        """Nothing: what engines did is read off them directly."""
        return []

    # What is measured.

    def totals(self) -> tuple[float, float]:
        """Seconds of work, and seconds of service, of all engines that serve or have served."""
        engines = [*self._engines.values(), *self._gone]
        return sum(engine.busy_until_now() for engine in engines), self._service_s()

    def _service_s(self) -> float:
        now, total = self._loop.time(), 0.0
        for place, (since, count) in enumerate(self.serving):
            until = self.serving[place + 1][0] if place + 1 < len(self.serving) else now
            total += count * (until - since)
        return total

    # Members that come and go.

    @property
    def count(self) -> int:
        """Generators that serve."""
        return len(self._engines)

    async def add(self, index: int | None = None, start_s: float | None = None) -> None:
        """Starts a generator; returns when it serves, with the newest weights."""
        if index is None:
            index, self._next = self._next, self._next + 1
        self.starting += 1
        try:
            await asyncio.sleep(self._timings.start_s if start_s is None else start_s)
        finally:
            self.starting -= 1
        engine = self._engine(index)
        while engine.version != self._version:
            await engine.update(self._version)
        self._engines[index] = engine
        self._balance.started_anew(index)
        self._come.set()
        self._count_changed()

    def remove(self) -> None:
        """Takes the slowest generator out of service, as the real run does; what it has begun it ends."""
        engine = self._engines.pop(self._balance.slowest(self._engines))
        self._gone.append(engine)
        self._count_changed()

    def lose(self, index: int) -> None:
        """A generator is gone at once, with its groups."""
        engine = self._engines.pop(index, None)
        if engine is not None:
            self._gone.append(engine)
            self._count_changed()
            engine.end()

    def stop(self) -> None:
        """Ends every engine."""
        for engine in [*self._engines.values(), *self._gone]:
            engine.end()

    def slow_down(self, slowness: float) -> None:
        """From now on every generator is so many times slower than measured, those that come later, too."""
        self._slowness = slowness
        for engine in self._engines.values():
            engine.slowness = slowness

    def _count_changed(self) -> None:
        self.serving.append((self._loop.time(), len(self._engines)))
