"""A wait ends in time and says what it waited for."""

from __future__ import annotations

import asyncio

import pytest

from actors.deadline import DeadlineError, within


async def answer(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return 7


def test_an_answer_in_time_is_returned() -> None:
    assert asyncio.run(within(answer(0.0), 5.0, "an answer", "some_s")) == 7


def test_a_late_answer_names_what_was_awaited_and_the_setting() -> None:
    with pytest.raises(DeadlineError, match=r"waited 0\.01 s \(some\.key_s\) for rollout 0 to answer"):
        asyncio.run(within(answer(5.0), 0.01, "rollout 0 to answer", "some.key_s"))


def test_other_errors_pass_through() -> None:
    async def fails() -> None:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        asyncio.run(within(fails(), 5.0, "an answer", "some_s"))
