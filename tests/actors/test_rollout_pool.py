"""The pool against fake generators: who gets the next group, and what becomes of one that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from actors.deadline import DeadlineError
from actors.rollout_pool import GeneratorLostError, RolloutPool, WeightSyncError
from medtvt_rl.config import Config, RunConfig
from medtvt_rl.rollout.config import RolloutConfig
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.types import Prompt

PROMPT = Prompt(prompt_id="p", token_ids=np.arange(3, dtype=np.int32), item_id=None, ground_truth="")


class Method:
    """An actor's method, called by `.remote`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class FakeGenerator:
    """Answers with its name; `fault` is raised instead of every answer, `gate` holds generation back."""

    def __init__(self, name: str) -> None:
        self.name, self.fault, self.checksum = name, None, 11
        self.gate = asyncio.Event()
        self.gate.set()
        self.groups: list[int] = []
        self.generate = Method(self._generate)
        self.update_weights = Method(lambda weights, version: self._answer(self.checksum))
        self.score = Method(lambda group, index: self._answer(np.zeros(2)))
        self.stats = Method(lambda: self._answer({"tokens_generated": 1.0}))

    fault: Exception | None

    def _generate(
        self, prompt: Prompt, group_id: int, num_completions: int, greedy: bool
    ) -> tuple[Awaitable[Any], str]:
        self.groups.append(group_id)
        return self._answer(f"header of {self.name}"), f"payload of {self.name}"

    async def _answer(self, value: Any) -> Any:
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return value


def pool_of(tmp_path: Path, count: int, **settings: float) -> tuple[RolloutPool, list[FakeGenerator], list[str]]:
    config = Config(run=RunConfig(name="r", root=str(tmp_path)), rollout=RolloutConfig(**settings))  # type: ignore[arg-type]
    generators, told = [FakeGenerator(f"g{i}") for i in range(count)], list[str]()
    return RolloutPool(config, generators, told.append), generators, told


def test_the_generator_with_the_fewest_completions_gets_the_next_group(tmp_path: Path) -> None:
    async def run() -> None:
        pool, generators, _ = pool_of(tmp_path, 2)
        for generator in generators:
            generator.gate.clear()
        tasks = []
        for group_id, num_completions in enumerate((8, 2, 2, 2, 4, 1)):
            tasks.append(asyncio.create_task(pool.generate(PROMPT, group_id, num_completions)))
            await asyncio.sleep(0)
        assert [generator.groups for generator in generators] == [[0, 5], [1, 2, 3, 4]]
        for generator in generators:
            generator.gate.set()
        assert (await tasks[0]) == ("header of g0", "payload of g0")
        await asyncio.gather(*tasks)
        await pool.generate(PROMPT, 6, 8)
        assert generators[0].groups[-1] == 6, "finished groups are no load"

    asyncio.run(run())


@pytest.mark.parametrize("fault", [ActorDiedError(), EngineBrokenError("a step of the engine failed")])
def test_a_lost_generator_gets_no_more_work_and_its_groups_go_to_others(tmp_path: Path, fault: Exception) -> None:
    async def run() -> None:
        pool, generators, told = pool_of(tmp_path, 3)
        generators[0].fault = fault
        answers = await asyncio.gather(*(pool.generate(PROMPT, group_id, 4) for group_id in range(30)))
        assert {header for header, _ in answers} == {"header of g1", "header of g2"}
        assert len(told) == 1 and told[0].startswith(f"rollout 0 is lost: {type(fault).__name__}")
        assert told[0].endswith("2 left")
        tried = len(generators[0].groups)
        await pool.generate(PROMPT, 31, 4)
        await pool.update_weights("weights", 1, 11)
        assert len(await pool.score("group", 0)) == len(await pool.stats()) == pool.num_left == 2
        assert len(generators[0].groups) == tried

    asyncio.run(run())


def test_a_generator_lost_at_a_weight_update_is_left_out(tmp_path: Path) -> None:
    async def run() -> None:
        pool, generators, told = pool_of(tmp_path, 2)
        generators[1].fault = EngineBrokenError("loading weights failed half-way")
        await pool.update_weights("weights", 1, 11)
        assert pool.num_left == 1 and "half-way" in told[0]

    asyncio.run(run())


def test_the_last_one_lost_ends_with_role_index_cause_and_log(tmp_path: Path) -> None:
    log = tmp_path / "r" / "logs" / "rollout_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("early\nSegmentation fault in paged attention\n")

    async def run() -> None:
        pool, generators, _ = pool_of(tmp_path, 1)
        generators[0].fault = EngineBrokenError("it broke")
        calls: list[Awaitable[Any]] = [pool.generate(PROMPT, 0, 4), pool.update_weights("w", 1, 11), pool.score("g", 0)]
        for call in calls:
            with pytest.raises(GeneratorLostError) as raised:
                await call
            assert str(raised.value).startswith("no rollout generator is left; rollout 0 is lost: EngineBrokenError:")
            assert "Segmentation fault in paged attention" in str(raised.value)

    asyncio.run(run())


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        pool, generators, _ = pool_of(tmp_path, 2)
        generators[1].checksum = 12
        with pytest.raises(WeightSyncError, match=r"rollout \[1\] hold checksum \[12\] of version 3, sent 11"):
            await pool.update_weights("weights", 3, 11)

    asyncio.run(run())


def test_a_late_or_failed_call_leaves_the_generator_in_rotation(tmp_path: Path) -> None:
    async def run() -> None:
        pool, generators, told = pool_of(tmp_path, 1, generate_timeout_s=0.01)
        generators[0].gate.clear()
        with pytest.raises(DeadlineError, match="rollout 0 to generate group 5"):
            await pool.generate(PROMPT, 5, 4)
        generators[0].gate.set()
        generators[0].fault = ValueError("this prompt does not fit")
        with pytest.raises(ValueError, match="does not fit"):
            await pool.generate(PROMPT, 6, 4)
        assert pool.num_left == 1 and not told

    asyncio.run(run())
