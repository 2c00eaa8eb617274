"""What cannot be measured, or not be learned from, costs no more than that: training goes on."""

from __future__ import annotations

import numpy as np
import pytest
from test_grpo_loop import FakeCluster, FakeEngines, FakeHeldOut, Told, run_loop

from medtvt_rl.faults import RoleLostError, TooFewCompletionsError
from medtvt_rl.types import LearnerStep
from pipelines.grpo_roles import TrainingGroup


class FailingHeldOut(FakeHeldOut):
    """The second measurement fails."""

    calls = 0

    async def measure(self) -> dict[str, float]:
        self.calls += 1
        if self.calls == 2:
            raise ValueError("one item cannot be read")
        return await super().measure()


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_held_out_measurement_that_fails_is_told_and_the_others_are_made(max_staleness: int) -> None:
    cluster, told = FakeCluster(train_s=0.02), Told()
    loop = run_loop(cluster, told, held_out=FailingHeldOut(cluster), max_staleness=max_staleness)
    assert loop.result.steps == 6
    ((version, what, why),) = told.unknown
    assert (version, what, why) == (2, "held-out answers", "one item cannot be read")
    measured = [metrics["held_out/version"] for metrics in told.metrics if "held_out/version" in metrics]
    assert 2.0 not in measured and {0.0, 6.0} <= set(measured)


def test_engines_that_cannot_be_compared_or_counted_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(self: FakeEngines, group: int, index: int) -> list[np.ndarray]:
        if self.cluster.version == 3:
            raise RuntimeError("late")
        return [np.full(3, 0.25)]

    counted = FakeEngines.stats

    async def stats(self: FakeEngines) -> list[dict[str, float]]:
        if self.cluster.version == 4:
            raise RuntimeError("silent")
        return await counted(self)

    monkeypatch.setattr(FakeEngines, "score", score)
    monkeypatch.setattr(FakeEngines, "stats", stats)
    told = Told()
    loop = run_loop(FakeCluster(), told, max_staleness=0)
    assert told.unknown == [(3, "engines against the learner", "late"), (4, "the engines' counters", "silent")]
    assert ["sync_gap_max" in metrics for metrics in told.metrics] == [True, True, False, True, True, True]
    assert loop.result.logprob_max_abs_diff == 0.25 and loop.result.steps == 6


def test_engines_that_are_late_with_their_first_counters_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, asked = FakeEngines.stats, list[int]()

    async def stats(self: FakeEngines) -> list[dict[str, float]]:
        asked.append(self.cluster.version)
        if len(asked) == 1:
            raise RuntimeError("late")
        return await counted(self)

    monkeypatch.setattr(FakeEngines, "stats", stats)
    told = Told()
    assert run_loop(FakeCluster(), told, max_staleness=0).result.steps == 6
    assert told.unknown == [(0, "the engines' counters", "late")] and asked == [0, 1, 2, 3, 4, 5, 6]


def test_a_lost_role_still_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(self: FakeEngines, group: int, index: int) -> list[np.ndarray]:
        raise RoleLostError("no rollout actor is left", ())

    monkeypatch.setattr(FakeEngines, "score", score)
    with pytest.raises(RoleLostError, match="no rollout actor is left"):
        run_loop(FakeCluster(), max_staleness=1)


def test_a_step_whose_sound_groups_are_too_few_for_the_ranks_changes_nothing() -> None:
    class ManyRanks(FakeCluster):
        async def train_step(self, groups: list[TrainingGroup], learning_rate: float, version: int) -> LearnerStep:
            if len(groups) < 4:
                raise TooFewCompletionsError("learner.num_workers: 16 ranks for 12 completions")
            return await super().train_step(groups, learning_rate, version)

    cluster, told = ManyRanks(sick=frozenset({5})), Told()
    loop = run_loop(cluster, told, max_staleness=0)
    assert loop.result.steps == 6 and loop.result.skipped_steps == 1 and told.left_out == [5]
    assert [len(step) for step in cluster.trained] == [4] * 5
