"""A first signal asks, a second one ends at once, and what is waited for meanwhile is given up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored_examples import a_config

from pipelines.command import in_session
from pipelines.reporter import Reporter
from pipelines.stopping import SIGNALS, Stop, Stopped, stop_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The test process keeps its own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_cancels(number: int) -> None:
    async def run() -> None:
        stop = Stop()
        with stop_on_signals(stop):
            os.kill(os.getpid(), number)
            await asyncio.wait_for(stop.wait(), 5)
            assert stop.requested and stop.number == number
            os.kill(os.getpid(), number)
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(5)

    asyncio.run(run())


def test_a_stop_ends_a_wait_and_gives_up_what_was_waited_for() -> None:
    async def run() -> None:
        stop, given_up = Stop(), asyncio.Event()

        async def slow() -> str:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                given_up.set()
                raise
            return "done"

        async def fail() -> str:
            raise ValueError("boom")

        assert await stop.unless(asyncio.sleep(0.01, "in time"), "late") == "in time"
        with pytest.raises(ValueError, match="boom"):
            await stop.unless(fail(), "late")
        waiting = asyncio.create_task(stop.unless(slow(), "late"))
        await asyncio.sleep(0.01)
        stop.request()
        assert await asyncio.wait_for(waiting, 5) == "late"
        await asyncio.wait_for(given_up.wait(), 5)
        assert await asyncio.wait_for(stop.unless(slow(), "late"), 5) == "late"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")]
)
def test_a_signal_outside_the_loop_ends_with_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int, words: str
) -> None:
    def work(reporter: Reporter) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came too late")

    assert in_session(a_config(tmp_path), work, with_ray=False) == code
    said = capsys.readouterr().err
    assert f"medtvt-rl: {words}: finished stages are kept, and the same command goes on from there" in said


def test_the_exit_code_says_which_signal() -> None:
    stopped = Stopped(signal.SIGTERM, "kept at step 3")
    assert str(stopped) == "SIGTERM: kept at step 3" and stopped.exit_code == 143
