"""The clock jumps, work shares its cores, and whoever would wait for ever is told so."""

from __future__ import annotations

import asyncio
import time

import pytest

from medtvt_rl.simulation.clock import StuckError, run_simulated
from medtvt_rl.simulation.cores import Cores


def test_an_hour_passes_at_once_and_in_order() -> None:
    async def main() -> list[tuple[str, float]]:
        seen = []

        async def sleeper(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((name, asyncio.get_running_loop().time()))

        await asyncio.gather(sleeper("hour", 3600), sleeper("second", 1), sleeper("minute", 60))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 600)
        return [*seen, ("deadline", asyncio.get_running_loop().time())]

    began = time.monotonic()
    assert run_simulated(main()) == [("second", 1.0), ("minute", 60.0), ("hour", 3600.0), ("deadline", 4200.0)]
    assert time.monotonic() - began < 10


def test_waiting_for_nothing_is_an_error_and_no_hang() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StuckError, match="stands still"):
        run_simulated(main())


def finish_times(capacity: float, beside: float, *work: tuple[float, float, float]) -> list[float]:
    """When (begin, seconds, threads) are done."""

    async def main() -> list[float]:
        cores = Cores(capacity, beside)

        async def one(begin: float, seconds: float, threads: float) -> float:
            await asyncio.sleep(begin)
            await cores.run(seconds, threads)
            return asyncio.get_running_loop().time()

        return list(await asyncio.gather(*(one(*each) for each in work)))

    return run_simulated(main())


def test_three_on_two_cores_run_at_two_thirds() -> None:
    assert finish_times(2, 1.0, (0, 2, 1), (0, 2, 1)) == pytest.approx([2, 2])
    assert finish_times(2, 1.0, (0, 2, 1), (0, 2, 1), (0, 2, 1)) == pytest.approx([3, 3, 3])
    # Alone for 1 s, then three for 1.5 s (1 s of work each), then two.
    assert finish_times(2, 1.0, (0, 4, 1), (1, 1, 1), (1, 3, 1)) == pytest.approx([4.5, 2.5, 4.5])


def test_a_thread_beside_another_is_slower_and_many_threads_take_their_share() -> None:
    assert finish_times(2, 0.8, (0, 4, 1)) == pytest.approx([4])
    assert finish_times(2, 0.8, (0, 4, 1), (0, 4, 1)) == pytest.approx([5, 5])
    assert finish_times(4, 1.0, (0, 2, 4), (0, 2, 4)) == pytest.approx([4, 4])
    assert finish_times(float("inf"), 0.5, *[(0, 3, 1)] * 50) == pytest.approx([3] * 50)


def test_work_that_is_left_says_how_much_of_it_was_done() -> None:
    async def main() -> tuple[float, float]:
        cores = Cores(1)
        first, second = cores.begin(10), cores.begin(10)
        await asyncio.sleep(4)
        spent = cores.leave(first)
        await second.done
        return spent, asyncio.get_running_loop().time()

    assert run_simulated(main()) == pytest.approx((2, 12))
