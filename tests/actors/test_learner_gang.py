"""How a batch is spread over ranks, and which rank's failure is told when several fail at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from actors import learner_gang
from actors.learner_gang import LearnerError, LearnerGang
from medtvt_rl.config import Config

LOST_PEER = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711")


def test_groups_stay_on_one_rank_where_their_tokens_allow() -> None:
    def group(place: int, *lengths: int) -> Any:
        finished = SimpleNamespace(header=SimpleNamespace(lengths=lengths), payload=place, reference=None)
        return SimpleNamespace(group=finished, advantages=np.arange(len(lengths)))

    shards = learner_gang.shard_groups([group(0, 9, 0, 8), group(1, 4, 5), group(2, 4, 5)], 2)
    assert [[(s.payload, s.indices) for s in rank] for rank in shards] == [
        [(0, (0, 1, 2))],
        [(1, (0, 1)), (2, (0, 1))],
    ]
    one, other = learner_gang.shard_groups([group(0, *[5] * 256)], 2)
    assert one[0].indices == tuple(range(128)) and other[0].indices == tuple(range(128, 256))
    assert other[0].advantages == tuple(map(float, range(128, 256)))


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
