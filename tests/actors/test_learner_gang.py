"""Which rank's failure is told when several fail at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors import learner_gang
from actors.learner_gang import LearnerError, LearnerGang
from medtvt_rl.config import Config

LOST_PEER = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711")


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([(0.0, LOST_PEER), (0.0, ValueError("bad shard"))], "rank 1 of 2, call: bad shard"),
        ([(0.0, LOST_PEER), (0.05, ValueError("bad shard"))], "rank 1 of 2, call: bad shard"),
        ([(0.0, LOST_PEER), (0.0, ActorDiedError())], "rank 1 of 2, call: The actor died"),
        ([(0.0, ActorDiedError()), (0.0, MemoryError("no room"))], "rank 1 of 2, call: no room"),
        ([(0.0, LOST_PEER), (60.0, ValueError("late"))], "rank 0 of 2, call: .gloo. Connection closed"),
    ],
)
def test_the_rank_that_says_why_is_told(
    monkeypatch: pytest.MonkeyPatch, failures: list[tuple[float, Exception]], told: str
) -> None:
    monkeypatch.setattr(learner_gang, "LAST_WORDS_S", 0.3)
    killed: list[Any] = []
    monkeypatch.setattr(learner_gang.ray, "kill", lambda worker, no_restart: killed.append(worker))

    async def fail(worker: int) -> None:
        seconds, error = failures[worker]
        await asyncio.sleep(seconds)
        raise error

    gang = LearnerGang(Config(), [0, 1])
    with pytest.raises(LearnerError, match=told):
        asyncio.run(gang._all("call", lambda worker, _: fail(worker), 5.0, "some_s"))
    assert killed == [0, 1]
