"""The engine of the simulation: batches that groups join, versions, updates, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from timing_models import timings

from medtvt_rl.simulation.clock import run_simulated
from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.engine import GoneError, SimulatedEngine


def run(body: Callable[[SimulatedEngine], Coroutine[Any, Any, Any]], max_running: int = 128, **settings: Any) -> Any:
    options = {name: settings.pop(name) for name in ("on_update", "slowness") if name in settings}

    async def main() -> Any:
        engine = SimulatedEngine(timings(**settings), Cores(), max_running, **options)
        result = await body(engine)
        engine.end()
        return result

    return run_simulated(main())


def now() -> float:
    return asyncio.get_running_loop().time()


def test_completions_run_together_and_the_longest_decides() -> None:
    async def body(engine: SimulatedEngine) -> tuple[float, float, float]:
        await engine.generate((10, 30, 50), 10)
        return now(), engine.tokens, engine.busy_until_now()

    assert run(body) == pytest.approx((0.5, 90, 0.5))
    assert run(body, slowness=5.0) == pytest.approx((2.5, 90, 2.5))
    assert run(body, prefill_group_s=0.1, prefill_completion_s=0.02, prefill_token_s=0.001)[0] == pytest.approx(0.67)
    # One at a time where there is room for one: a group is begun whole.
    assert run(body, decode_s=((1.0, 0.01), (3.0, 0.03)))[0] == pytest.approx(10 * 0.03 + 20 * 0.02 + 20 * 0.01)


def test_a_group_joins_between_two_tokens_and_one_without_room_waits() -> None:
    async def body(engine: SimulatedEngine) -> tuple[float, float]:
        first = engine.generate((100,), 10)
        await asyncio.sleep(0.205)
        await engine.generate((100,), 10)
        joined = now()
        await first
        return joined, now()

    joined, _ = run(body)
    assert joined == pytest.approx(0.21 + 1.0)
    assert run(body, max_running=1)[0] == pytest.approx(2.0)


def test_new_weights_come_between_two_tokens_and_every_group_says_its_versions() -> None:
    async def body(engine: SimulatedEngine) -> tuple[Any, Any, float]:
        first = engine.generate((100,), 10)
        await asyncio.sleep(0.302)
        await engine.update(1)
        loaded = now()
        second = await engine.generate((10,), 10)
        return await first, second, loaded

    assert run(body, load_s=0.5) == ((0, 1), (1, 1), pytest.approx(0.81))
    assert run(body, load_s=0.5, on_update="finish")[0::2] == ((0, 0), pytest.approx(1.5))
    assert run(body, load_s=0.5, on_update="restart")[0] == (1, 1)


def test_what_runs_is_computed_again_after_an_update() -> None:
    async def body(engine: SimulatedEngine) -> float:
        first = engine.generate((100, 100), 1000)
        await asyncio.sleep(1.5)
        await engine.update(1)
        await first
        return now()

    # The prompt, and 50 tokens of each of two completions.
    assert run(body, prefill_token_s=0.001, recompute_token_s=0.0005) == pytest.approx(1.0 + 1.0 + 0.55)


def test_a_wave_begins_when_all_of_it_is_there() -> None:
    async def body(engine: SimulatedEngine) -> float:
        engine.expect(2)
        first = engine.generate((10,), 10)
        await asyncio.sleep(3)
        await engine.generate((10,), 10)
        await first
        return now()

    assert run(body) == pytest.approx(3.1)


def test_the_end_of_an_engine_fails_what_it_was_asked_for() -> None:
    async def body(engine: SimulatedEngine) -> None:
        asked = [engine.generate((100,), 10), engine.generate((100,), 10), engine.update(1)]
        asyncio.get_running_loop().call_later(0.005, engine.end)
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(each, GoneError) for each in found] == [True, True, False]

    run(body)
