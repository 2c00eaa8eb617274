"""A rollout engine on a simulated clock: continuous batching, as vLLM does it, without computing anything.

Groups join between two tokens; all completions that run get a token together; weights are loaded between two tokens.
Between two changes nothing but time passes, so that a completion costs one event and not one a token.

Owns: who runs, versions, busy time. Does not own: how long anything takes (timings.py), cores (cores.py).
Left out: a KV cache that is too small for what runs; chunks of a prefill among decodes.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.timings import Timings

OnUpdate = Literal["continue", "finish", "restart"]


class GoneError(RuntimeError):
    """The machine of the generator is gone, and with it what it was doing."""


@dataclass(slots=True, eq=False)
class Job:
    """Completions of one prompt; the future is of (oldest version, newest version)."""

    lengths: tuple[int, ...]
    prompt_tokens: float
    future: asyncio.Future[tuple[int, int]]
    left: int = 0
    version: int = 0


@dataclass(slots=True)
class _Update:
    version: int
    future: asyncio.Future[None] = field(repr=False)


class SimulatedEngine:
    """One generator.

    Args:
        slowness: how many times slower than measured it is.
    """

    def __init__(
        self,
        timings: Timings,
        cores: Cores,
        max_running: int,
        on_update: OnUpdate = "continue",
        slowness: float = 1.0,
        threads: float = 1.0,
    ) -> None:
        self._timings, self._cores, self._threads = timings, cores, threads
        self._max_running, self._on_update, self.slowness = max_running, on_update, slowness
        self.version = 0
        self.busy_s = self.tokens = 0.0
        self._waiting: deque[Job] = deque()
        self._updates: deque[_Update] = deque()
        self._running: list[tuple[float, int, Job, int]] = []
        self._decoded = 0.0
        self._context = 0.0
        self._count = 0
        self._wave = 0
        self._news = asyncio.Event()
        self._busy_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._serve())

    def expect(self, jobs: int) -> None:
        """The next so many jobs begin together."""
        self._wave += jobs

    def generate(self, lengths: Sequence[int], prompt_tokens: float) -> asyncio.Future[tuple[int, int]]:
        """Completions of these lengths; of length 0 they are a prompt that is only scored."""
        job = Job(tuple(lengths), prompt_tokens, self._loop.create_future())
        self._waiting.append(job)
        self._wave = max(0, self._wave - 1)
        self._news.set()
        return job.future

    def update(self, version: int) -> asyncio.Future[None]:
        """Loads weights between two tokens."""
        update = _Update(version, self._loop.create_future())
        self._updates.append(update)
        self._news.set()
        return update.future

    def end(self) -> None:
        """Its machine is gone: whatever it was asked for fails."""
        self._task.cancel()
        self._note_idle()
        jobs = {*self._waiting, *(job for _, _, job, _ in self._running)}
        asked: list[asyncio.Future[Any]] = [job.future for job in jobs]
        asked += [update.future for update in self._updates]
        for future in asked:
            if not future.done():
                future.set_exception(GoneError("the generator is gone"))
                future.exception()  # nobody may be listening any more

    def busy_until_now(self) -> float:
        """Seconds of work so far."""
        now = self._loop.time()
        return self.busy_s + (now - self._busy_since if self._busy_since is not None else 0.0)

    async def _serve(self) -> None:
        while True:
            if not self._updates and not self._running and (not self._waiting or self._wave):
                self._note_idle()
                self._news.clear()
                await self._news.wait()
                continue
            if self._busy_since is None:
                self._busy_since = self._loop.time()
            if self._updates and not (self._on_update == "finish" and self._running):
                await self._load(self._updates.popleft())
            elif self._waiting and not self._wave and not self._updates and len(self._running) < self._max_running:
                await self._admit()
            else:
                await self._decode()

    def _note_idle(self) -> None:
        if self._busy_since is not None:
            self.busy_s += self._loop.time() - self._busy_since
            self._busy_since = None

    async def _work(self, seconds: float) -> None:
        await self._cores.run(seconds * self.slowness, self._threads)

    async def _load(self, update: _Update) -> None:
        timings, jobs = self._timings, {job for _, _, job, _ in self._running}
        await self._work(timings.load_s)
        self.version = update.version
        if not update.future.done():
            update.future.set_result(None)
        if self._on_update == "restart":
            self._waiting.extendleft(sorted(jobs, key=lambda job: -job.version))
            self._running, self._context = [], 0.0
            return
        # Keys and values of everything that runs are computed anew, a prompt once for its completions.
        prompts = sum(job.prompt_tokens for job in jobs)
        shared = sum(job.prompt_tokens for _, _, job, _ in self._running)
        again = prompts + max(0.0, self._context - shared)
        await self._work(timings.recompute_token_s * again)

    async def _admit(self) -> None:
        """Begins with all jobs that there is room for."""
        begun, seconds = list[Job](), 0.0
        while self._waiting and len(self._running) + sum(len(job.lengths) for job in begun) < self._max_running:
            job = self._waiting.popleft()
            job.left, job.version = len(job.lengths), self.version
            begun.append(job)
            seconds += self._timings.prefill_s(len(job.lengths), job.prompt_tokens)
        await self._work(seconds)
        for job in begun:
            for length in job.lengths:
                if length <= 0:
                    self._end_one(job)
                    continue
                self._count += 1
                heapq.heappush(self._running, (self._decoded + length, self._count, job, length))
                self._context += job.prompt_tokens

    async def _decode(self) -> None:
        """Tokens until the first completion ends, or until something is new."""
        count = len(self._running)
        tokens = self._running[0][0] - self._decoded
        middle = self._context + count * tokens / 2
        step_s = self._timings.decode_step_s(count, middle) * self.slowness
        self._news.clear()
        work = self._cores.begin(tokens * step_s, self._threads)
        news = asyncio.ensure_future(self._news.wait())
        try:
            both: set[asyncio.Future[Any]] = {work.done, news}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            spent = self._cores.leave(work)
            if not work.done.done():  # the token under way is made first
                whole = min(tokens, math.ceil(spent / step_s - 1e-9))
                await self._cores.run(whole * step_s - spent, self._threads)
                tokens = whole
        finally:
            self._cores.leave(work)
            news.cancel()
        self._decoded += tokens
        self._context += count * tokens
        self.tokens += count * tokens
        while self._running and self._running[0][0] <= self._decoded + 1e-6:
            _, _, job, length = heapq.heappop(self._running)
            self._context -= job.prompt_tokens + length
            self._end_one(job)

    def _end_one(self, job: Job) -> None:
        job.left -= 1
        if job.left == 0 and not job.future.done():
            job.future.set_result((job.version, self.version))
