"""Where the time of a step goes: its phases add up to it, and a role that nobody asks is idle."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_grpo_loop import FakeCluster, FakeEngines, Told, run_loop

from pipelines import step_clock
from pipelines.step_clock import PHASES, StepClock

PROBE_S, SAVE_S = 0.03, 0.02
EARLY_S = 0.002
"""A sleep may end so much before its time."""


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_the_phases_of_every_row_add_up_to_its_step(max_staleness: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(self: FakeEngines, group: int, index: int) -> list[np.ndarray]:
        await asyncio.sleep(PROBE_S)
        return [np.zeros(3)]

    class SlowStore(FakeCluster):
        async def save(self, *given: Any) -> None:
            await asyncio.sleep(SAVE_S)
            await super().save(*given)

    monkeypatch.setattr(FakeEngines, "score", score)
    told, cluster = Told(), SlowStore()
    run_loop(cluster, told, max_staleness=max_staleness, checkpoint_every=2)
    for row in told.metrics:
        assert sum(row[f"seconds/{phase}"] for phase in PHASES) == pytest.approx(row["seconds/step"], abs=1e-6)
    assert cluster.checkpoints == [2, 4]
    kept = [row for row in told.metrics if "checkpoint/blocked_s" in row]
    assert kept == [told.metrics[2], told.metrics[4]]
    if max_staleness == 0:
        assert all(row["seconds/conclude"] > PROBE_S - EARLY_S for row in told.metrics[1:])
    assert all(row["seconds/checkpoint"] > SAVE_S - EARLY_S for row in kept)
    assert all(row["checkpoint/blocked_s"] == row["seconds/checkpoint"] for row in kept)


def test_a_role_is_idle_while_no_call_of_it_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: 0.0, process_time=lambda: 0.0)
    monkeypatch.setattr(step_clock, "time", fake)
    clock = StepClock()
    first, second = clock.asked("reward"), clock.asked("reward")
    now[0] += 1  # idle
    with first:
        now[0] += 2
        second.__enter__()
        now[0] += 4
    now[0] += 8
    assert clock.end("publish") == {
        **{f"seconds/{phase}": 0.0 for phase in (*PHASES, "wait_slots", "loop_cpu", "driver_cpu")},
        **{"seconds/publish": 15.0, "seconds/step": 15.0, "seconds/reward_idle": 1.0},
    }
    now[0] += 16
    second.__exit__(None, None, None)
    now[0] += 32  # idle
    with clock.beside("wait_slots"):
        now[0] += 64  # idle
    assert clock.lap("wait_groups") == 112.0
    told = clock.end("publish")
    assert told["seconds/reward_idle"] == 96.0 and told["seconds/wait_slots"] == 64.0
    now[0] += 128  # idle
    assert clock.end("publish")["seconds/reward_idle"] == 128.0
