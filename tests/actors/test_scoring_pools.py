"""A scorer that hangs or dies is started again; what waited behind it is scored by the new one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.deadline import DeadlineError
from actors.failure import ActorError
from actors.scoring_pools import ReferencePool, ScorerPool
from medtvt_rl.config import Config, RunConfig


class FakeScorer:
    """Scores one group at a time; hangs at the group "hang", dies at "die", and with `kill` for whoever waits."""

    def __init__(self, log: Path) -> None:
        self.score = self.logprobs = self
        self.log, self.lock, self.dead = log, asyncio.Lock(), asyncio.Event()

    def remote(self, group: str) -> Any:
        return self._score(group)

    async def _score(self, group: str) -> str:
        work = asyncio.ensure_future(self._work(group))
        end = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
        if self.dead.is_set():
            work.cancel()
            raise ActorDiedError()
        end.cancel()
        return work.result()

    async def _work(self, group: str) -> str:
        async with self.lock:
            if group == "die":
                self.dead.set()
            if group == "hang":
                self.log.write_text("while True: pass\n")
                await asyncio.sleep(60)
            return f"rewards of {group}"


def config_at(tmp_path: Path) -> Config:
    (tmp_path / "r" / "logs").mkdir(parents=True)
    return Config(run=RunConfig(name="r", root=str(tmp_path)), score_timeout_s=0.2)


@pytest.mark.parametrize(("group", "error"), [("hang", DeadlineError), ("die", ActorError)])
def test_a_scorer_that_hangs_or_dies_is_started_again(tmp_path: Path, group: str, error: type[Exception]) -> None:
    async def run() -> None:
        config, started, killed = config_at(tmp_path), list[FakeScorer](), list[FakeScorer]()
        log = config.folder / "logs" / "reward_0.log"

        def start(index: int) -> FakeScorer:
            assert index == 0
            started.append(FakeScorer(log))
            return started[-1]

        def kill(scorer: FakeScorer) -> None:
            killed.append(scorer)
            scorer.dead.set()

        pool = ScorerPool(config, start, kill)
        first = asyncio.create_task(pool.score(group))
        await asyncio.sleep(0.05)
        behind = asyncio.create_task(pool.score("behind"))
        with pytest.raises(error, match="reward 0") as raised:
            await first
        assert "while True: pass" in str(raised.value) or group == "die"
        if group == "hang":
            assert await behind == "rewards of behind"
        else:
            await asyncio.gather(behind, return_exceptions=True)
        assert await pool.score("later") == "rewards of later"
        assert len(started) == len(killed) + 1 and started[0] in killed

    asyncio.run(run())


def test_a_reference_that_dies_names_itself_and_its_log(tmp_path: Path) -> None:
    async def run() -> None:
        config = config_at(tmp_path)
        log = config.folder / "logs" / "reference_0.log"
        log.write_text("out of memory\n")
        reference = FakeScorer(log)

        class Logprobs:
            def remote(self, group: str) -> Any:
                return reference.remote(group), "payload"

        reference.logprobs = Logprobs()  # type: ignore[assignment]
        pool = ReferencePool(config, [reference])
        assert await pool.logprobs("a") == ("payload", "rewards of a")  # type: ignore[arg-type]
        with pytest.raises(ActorError, match="reference 0, asked to score a group: ActorDiedError") as raised:
            await pool.logprobs("die")  # type: ignore[arg-type]
        assert "out of memory" in str(raised.value)

    asyncio.run(run())
