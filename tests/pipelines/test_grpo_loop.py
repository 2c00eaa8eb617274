"""The loop against fakes: its order of events, its bound on staleness, and what it does when a group fails."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from medtvt_rl.algorithm.config import GrpoConfig
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import GroupHeader, LearnerStep, Prompt
from pipelines.grpo_loop import GrpoLoop, LoopError, TrainingGroup, learning_rate


class FakeScorers:
    async def score(self, group: int) -> GroupRewards:
        values = np.array([0.0, 1.0, 0.5, 0.25], dtype=np.float32)
        return GroupRewards(
            components={"jaccard": values}, total=values, failed=np.zeros(4, dtype=bool), reasons=(None,) * 4
        )


class FakeEngines:
    """The generators: they sleep for random times, and fail where they are told to."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int) -> tuple[GroupHeader, int]:
        cluster = self.cluster
        cluster.started_at[group_id] = version = cluster.version
        await asyncio.sleep(cluster.random.random() * 0.004)
        if group_id in cluster.fail:
            raise RuntimeError("the engine is on fire")
        header = GroupHeader(
            group_id=group_id,
            prompt_id=prompt.prompt_id,
            lengths=(3,) * num_completions,
            num_cut=0,
            oldest_version=version,
            newest_version=cluster.version,
            generate_s=0.0,
        )
        return header, group_id

    async def update_weights(self, weights: int, version: int, checksum: int) -> None:
        assert weights == version
        self.cluster.version = version

    async def score(self, group: int, index: int) -> list[np.ndarray]:
        return [np.zeros(3), np.full(3, self.cluster.gap)]


class FakeCluster:
    """Reference and learner, and what all fakes share: the published version, and notes of every event."""

    def __init__(
        self,
        seed: int = 0,
        fail: frozenset[int] = frozenset(),
        gap: float = 0.0,
        skip: frozenset[int] = frozenset(),
        train_s: float = 0.002,
    ) -> None:
        self.skip, self.train_s = skip, train_s
        self.gap = gap
        self.version = 0
        self.random = random.Random(seed)
        self.fail = fail
        self.trained: list[list[int]] = []
        self.staleness: list[int] = []
        self.started_at: dict[int, int] = {}

    async def logprobs(self, group: int) -> tuple[int, np.ndarray]:
        await asyncio.sleep(self.random.random() * 0.002)
        return group, np.zeros(4, dtype=np.float32)

    async def train_step(self, groups: list[TrainingGroup], learning_rate: float, version: int) -> LearnerStep:
        assert version == self.version
        await asyncio.sleep(self.train_s)
        self.trained.append([g.group.header.group_id for g in groups])
        self.staleness.extend(version - g.group.header.oldest_version for g in groups)
        return LearnerStep(metrics={"skipped": float(version in self.skip)})

    async def export(self, version: int) -> tuple[int, int]:
        return version, 0

    async def score(self, group: int, index: int) -> np.ndarray:
        return np.zeros(3)


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.given_up: list[tuple[int, str, str]] = []

    def step(self, step: int, metrics: dict[str, float], groups: list[TrainingGroup]) -> None:
        assert step == len(self.metrics)
        self.metrics.append(metrics)

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        self.given_up.append((group_id, prompt_id, reason))


def run_loop(cluster: FakeCluster, told: Told | None = None, **settings: object) -> GrpoLoop:
    config = GrpoConfig(steps=6, groups_per_step=4, group_size=4, **settings)  # type: ignore[arg-type]
    prompts = [
        Prompt(prompt_id=f"p{i}", token_ids=np.arange(3, dtype=np.int32), item_id=None, ground_truth="")
        for i in range(5)
    ]

    async def run() -> GrpoLoop:
        loop = GrpoLoop(
            config, PromptSampler(prompts, 0), FakeEngines(cluster), FakeScorers(), cluster, cluster, told or Told()
        )
        await asyncio.wait_for(loop.run(), 20)
        return loop

    return asyncio.run(run())


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_every_group_is_trained_once_within_the_bound(max_staleness: int) -> None:
    for seed in range(10):
        cluster = FakeCluster(seed)
        loop = run_loop(cluster, max_staleness=max_staleness)
        trained = [group for step in cluster.trained for group in step]
        assert sorted(trained) == list(range(24))
        assert max(cluster.staleness) <= max_staleness
        assert loop.result.steps == 6
        assert loop.result.completions == 96
        assert loop.result.max_staleness_seen == max(cluster.staleness)


def test_on_policy_training_takes_groups_in_order_and_starts_none_early() -> None:
    cluster = FakeCluster()
    run_loop(cluster, max_staleness=0)
    assert cluster.trained == [list(range(4 * step, 4 * step + 4)) for step in range(6)]
    assert all(cluster.started_at[group] == group // 4 for group in range(24))


def test_a_failed_group_is_replaced() -> None:
    cluster, told = FakeCluster(fail=frozenset({2, 9})), Told()
    loop = run_loop(cluster, told, max_staleness=1)
    trained = [group for step in cluster.trained for group in step]
    assert len(trained) == len(set(trained)) == 24
    assert not {2, 9} & set(trained)
    assert loop.result.steps == 6
    assert loop.result.discarded == 2 == sum(metrics["groups/discarded"] for metrics in told.metrics)
    assert sorted(group_id for group_id, _, _ in told.given_up) == [2, 9]
    assert {reason for _, _, reason in told.given_up} == {"RuntimeError: the engine is on fire"}


def test_groups_that_keep_failing_end_the_run_with_the_reason() -> None:
    with pytest.raises(LoopError, match="the engine is on fire"):
        run_loop(FakeCluster(fail=frozenset(range(1000))))


def test_groups_that_fail_while_the_learner_trains_are_not_replaced_without_end() -> None:
    cluster, told = FakeCluster(fail=frozenset(range(4, 10**6)), train_s=0.3), Told()
    with pytest.raises(LoopError, match="the engine is on fire"):
        run_loop(cluster, told, max_staleness=1)
    assert len(cluster.trained) == 1
    assert 8 <= len(told.given_up) < 40, "0.3 s hold hundreds of failures"


def test_skipped_steps_are_counted_and_five_in_a_row_end_the_run() -> None:
    assert run_loop(FakeCluster(skip=frozenset({1, 2, 4, 5}))).result.skipped_steps == 4
    with pytest.raises(LoopError, match=r"5 learner steps in a row .* groups 20, 21, 22, 23"):
        run_loop(FakeCluster(skip=frozenset(range(1, 6))))


@pytest.mark.parametrize(("gap", "reported"), [(0.5, 0.5), (float("nan"), float("inf"))])
def test_a_difference_between_engine_and_learner_after_a_sync_is_reported(gap: float, reported: float) -> None:
    assert run_loop(FakeCluster(gap=gap)).result.logprob_max_abs_diff == reported


def test_learning_rate_warms_up_and_decays() -> None:
    config = GrpoConfig(steps=101, warmup_steps=5, learning_rate=1.0, final_lr_share=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 50) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)
