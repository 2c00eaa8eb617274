"""The loop against fakes: its order of events, its bound on staleness, and what it does when a group fails."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.algorithm.config import DynamicSamplingConfig, GrpoConfig, HeldOutConfig, OverlongConfig
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import GroupHeader, LearnerStep, Prompt, ReferenceHeader
from pipelines.group_ledger import GroupLedger
from pipelines.grpo_loop import GrpoLoop
from pipelines.grpo_roles import FinishedGroup, LoopError, TrainedStep, TrainingGroup
from pipelines.stopping import Stop


class FakeScorers:
    """All completions of a group in `equal` earn the same."""

    def __init__(self, equal: frozenset[int] = frozenset()) -> None:
        self.equal = equal

    async def score(self, group: int) -> GroupRewards:
        values = np.array([0.0, 1.0, 0.5, 0.25], dtype=np.float32)
        if group in self.equal:
            values = np.ones(4, dtype=np.float32)
        return GroupRewards(
            components={"jaccard": values}, total=values, failed=np.zeros(4, dtype=bool), reasons=(None,) * 4
        )


class FakeEngines:
    """The generators: they sleep for random times, and fail where they are told to."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    def together(self, group_ids: list[int], num_completions: int) -> None:
        assert num_completions == 4
        self.cluster.waves.append(list(group_ids))

    async def stats(self) -> list[dict[str, float]]:
        counters = ("prompt_tokens", "prompt_tokens_shared", "busy_s", "idle_s", "num_updates", "update_s", "load_s")
        return [{"tokens_generated": 10.0 * self.cluster.version, **dict.fromkeys(counters, 0.0)}]

    async def generate(self, prompt: Prompt, group_id: int, num_completions: int) -> tuple[GroupHeader, int]:
        cluster = self.cluster
        cluster.started_at[group_id] = version = cluster.version
        cluster.asked[group_id] = prompt.prompt_id
        await asyncio.sleep(cluster.random.random() * 0.004)
        if group_id in cluster.fail:
            await asyncio.sleep(0.01)
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
        sick: frozenset[int] = frozenset(),
        first: int = 0,
    ) -> None:
        self.skip, self.train_s = skip, train_s
        self.sick = sick
        self.waves: list[list[int]] = []
        self.checkpoints: list[int] = []
        self.loop: GrpoLoop
        self.wants_checkpoint_in: int | None = None
        self.states: dict[int, tuple[dict[str, object], list[FinishedGroup]]] = {}
        self.scores: dict[int, float] = {}
        self.newest: int | None = None
        self.writing: asyncio.Task[None] | None = None
        self.measuring: int | None = None
        self.first = first
        self.last_batch: list[TrainingGroup] = []
        self.gap = gap
        self.version = first
        self.random = random.Random(seed)
        self.fail = fail
        self.trained: list[list[int]] = []
        self.staleness: list[int] = []
        self.started_at: dict[int, int] = {}
        self.asked: dict[int, str] = {}

    async def logprobs(self, group: int) -> tuple[int, ReferenceHeader]:
        await asyncio.sleep(self.random.random() * 0.002)
        return group, ReferenceHeader(kl=np.zeros(4, dtype=np.float32), seconds=0.001)

    async def train_step(self, groups: list[TrainingGroup], learning_rate: float, version: int) -> LearnerStep:
        assert version == self.version
        if version == self.wants_checkpoint_in:
            assert self.loop.keep_soon() == (self.loop._config.checkpoint_every > 0)
        self.last_batch = groups
        assert len({group.group.reference is None for group in groups}) == 1, "all have reference log-probs, or none"
        await asyncio.sleep(self.train_s)
        culprits = tuple(sorted({group.group_id for group in groups} & self.sick))
        if culprits:
            return LearnerStep(metrics={"skipped": 1.0}, skipped="a loss is not finite", culprits=culprits)
        self.trained.append([g.group.header.group_id for g in groups])
        self.staleness.extend(version - g.group.header.oldest_version for g in groups)
        skipped = "the gradient norm, inf, is not finite" if version in self.skip else None
        return LearnerStep(metrics={"skipped": float(version in self.skip)}, skipped=skipped)

    async def save(
        self,
        version: int,
        state: dict[str, object],
        groups: list[FinishedGroup],
        told: asyncio.Future[None] | None = None,
    ) -> None:
        await self.close()
        if version == self.newest:
            return
        assert version == len(self.trained) + self.first
        kept = json.loads(json.dumps(state)), list(groups)
        self.writing = asyncio.create_task(self.write(version, kept, told))

    async def write(
        self,
        version: int,
        kept: tuple[dict[str, object], list[FinishedGroup]],
        told: asyncio.Future[None] | None,
    ) -> None:
        """As the keeper does: behind training, and not where the step is not told."""
        await asyncio.sleep(self.random.random() * 0.002)
        if told is not None:
            await asyncio.wait([told])
            if told.cancelled() or told.exception() is not None:
                return
        self.checkpoints.append(version)
        self.states[version], self.newest = kept, version

    async def close(self) -> None:
        if self.writing is not None:
            await self.writing

    def scored(self, metrics: dict[str, float]) -> None:
        if metrics:
            self.scores[int(metrics["held_out/version"])] = metrics["held_out/jaccard"]

    async def export(self, version: int) -> tuple[int, int]:
        return version, 0

    async def score(self, group: int, index: int) -> np.ndarray:
        return np.zeros(3)


class Told:
    """An observer that keeps what it is told."""

    def __init__(self, first_step: int = 0) -> None:
        self.first_step = first_step
        self.metrics: list[dict[str, float]] = []
        self.given_up: list[tuple[int, str, str]] = []
        self.made_way: list[int] = []
        self.left_out: list[int] = []
        self.stopped_for: list[int] = []
        self.unknown: list[tuple[int, str, str]] = []
        self.late: list[dict[str, float]] = []

    def step(self, trained: TrainedStep) -> None:
        assert trained.step == self.first_step + len(self.metrics)
        self.metrics.append(trained.metrics)

    def replaced(self, group: FinishedGroup) -> None:
        self.made_way.append(group.header.group_id)

    def nonfinite(self, step: int, groups: list[TrainingGroup], reason: str, updates: int) -> None:
        (self.stopped_for if updates else self.left_out).extend(group.group_id for group in groups)

    def measured(self, metrics: dict[str, float]) -> None:
        self.late.append(metrics)

    def unmeasured(self, version: int, what: str, error: Exception) -> None:
        self.unknown.append((version, what, str(error)))

    def discarded(self, group_id: int, prompt_id: str, reason: str) -> None:
        self.given_up.append((group_id, prompt_id, reason))


class FakeHeldOut:
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.measured_while_trained: list[bool] = []

    async def measure(self) -> dict[str, float]:
        version, trained = self.cluster.version, len(self.cluster.trained)
        for _ in range(50):
            if len(self.cluster.trained) > trained:
                break
            await asyncio.sleep(0.001)
        self.measured_while_trained.append(len(self.cluster.trained) > trained)
        return {"jaccard": float(version)}


def run_loop(
    cluster: FakeCluster,
    told: Told | None = None,
    equal: frozenset[int] = frozenset(),
    held_out: FakeHeldOut | None = None,
    state: tuple[dict[str, object], list[FinishedGroup]] | None = None,
    end: str = "",
    after_s: float = 0.0,
    with_reference: bool = True,
    **settings: object,
) -> GrpoLoop:
    """Runs to the last step; or for a while, and is then stopped or killed."""
    every = HeldOutConfig(every_steps=2)
    config = GrpoConfig(steps=6, groups_per_step=4, group_size=4, held_out=every, **settings)  # type: ignore[arg-type]
    prompts = [
        Prompt(prompt_id=f"p{i}", token_ids=np.arange(3, dtype=np.int32), item_id=None, ground_truth="")
        for i in range(5)
    ]

    async def run() -> GrpoLoop:
        sampler, engines, scorers = PromptSampler(prompts, 0), FakeEngines(cluster), FakeScorers(equal)
        stop = Stop()
        reference = cluster if with_reference else None
        roles = sampler, engines, scorers, reference, cluster, told or Told(), held_out, cluster, stop
        loop = cluster.loop = GrpoLoop(config, 3, *roles)
        if state is not None:
            loop.load_state_dict(*state)
        running = asyncio.create_task(loop.run())
        if end:
            await asyncio.wait({running}, timeout=after_s)
            stop.request() if end == "stop" else running.cancel()
        try:
            await asyncio.wait_for(running, 20)
            await cluster.close()
        except asyncio.CancelledError:
            assert end == "kill"
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


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("told_of", ["discarded", "replaced"])
def test_a_group_whose_end_cannot_be_told_ends_the_run(told_of: str, max_staleness: int) -> None:
    class FullDisk(Told):
        def fail(self, *what: object) -> None:
            raise OSError("No space left on device")

    told, cluster = FullDisk(), FakeCluster(fail=frozenset({2}))
    setattr(told, told_of, told.fail)
    limit = DynamicSamplingConfig(max_replaced=2)
    with pytest.raises(OSError, match="No space left on device"):
        run_loop(cluster, told, frozenset({1}), max_staleness=max_staleness, dynamic_sampling=limit)
    assert getattr(cluster.loop.result, told_of) == 1 and not cluster.trained


def test_what_a_publication_raises_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def update_weights(self: FakeEngines, weights: int, version: int, checksum: int) -> None:
        raise RuntimeError("a checksum of another form")

    monkeypatch.setattr(FakeEngines, "update_weights", update_weights)
    with pytest.raises(RuntimeError, match="a checksum of another form"):
        run_loop(FakeCluster())


def test_skipped_steps_are_counted_and_five_in_a_row_end_the_run() -> None:
    assert run_loop(FakeCluster(skip=frozenset({1, 2, 4, 5}))).result.skipped_steps == 4
    with pytest.raises(LoopError, match=r"5 learner steps in a row .* groups 20, 21, 22, 23"):
        run_loop(FakeCluster(skip=frozenset(range(1, 6))))


@pytest.mark.parametrize(("gap", "reported"), [(0.5, 0.5), (float("nan"), float("inf"))])
def test_a_difference_between_engine_and_learner_after_a_sync_is_reported(gap: float, reported: float) -> None:
    assert run_loop(FakeCluster(gap=gap)).result.logprob_max_abs_diff == reported


def test_on_policy_groups_go_out_in_whole_waves_and_others_do_not() -> None:
    cluster = FakeCluster(fail=frozenset({1, 2}))
    run_loop(cluster, max_staleness=0)
    assert cluster.waves[:3] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
    cluster = FakeCluster()
    run_loop(cluster, max_staleness=1)
    assert not cluster.waves


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_groups_of_equal_rewards_make_way_for_others(max_staleness: int) -> None:
    equal, told = frozenset({0, 2, 5, 11, 12, 13, 20}), Told()
    cluster = FakeCluster()
    settings = {"max_staleness": max_staleness, "dynamic_sampling": DynamicSamplingConfig(max_replaced=4)}
    loop = run_loop(cluster, told, equal, **settings)
    trained = [group for step in cluster.trained for group in step]
    assert not equal & set(trained)
    assert len(trained) == len(set(trained)) == 24
    assert max(cluster.staleness) <= max_staleness
    assert sorted(told.made_way) == sorted(equal)
    assert loop.result.replaced == 7 == sum(metrics["groups/replaced"] for metrics in told.metrics)
    assert not told.given_up and loop.result.discarded == 0
    assert all(metrics["groups/zero_variance_share"] == 0 for metrics in told.metrics)


def test_replacing_has_a_limit_and_hangs_on_no_group_s_speed() -> None:
    kept = set()
    for seed in range(8):
        cluster = FakeCluster(seed)
        limit = DynamicSamplingConfig(max_replaced=1)
        loop = run_loop(cluster, None, frozenset(range(1000)), max_staleness=0, dynamic_sampling=limit)
        assert loop.result.replaced == 6
        kept.add(tuple(group for step in cluster.trained for group in step))
    assert len(kept) == 1


def test_a_step_goes_on_without_the_groups_that_are_not_finite() -> None:
    told, cluster = Told(), FakeCluster(sick=frozenset({1, 9, 10}))
    loop = run_loop(cluster, told, max_staleness=1)
    assert sorted(told.left_out) == [1, 9, 10]
    assert [len(step) for step in cluster.trained] == [3, 4, 2, 4, 4, 4]
    assert loop.result.nonfinite == 3 and loop.result.skipped_steps == 0
    with pytest.raises(LoopError, match=r"max_nonfinite_groups = 2.*groups 9, 10.*lower grpo.learning_rate"):
        run_loop(FakeCluster(sick=frozenset({1, 9, 10})), max_nonfinite_groups=2)


def test_a_step_that_stops_after_its_first_update_was_trained_on_all_its_groups() -> None:
    class Stopping(FakeCluster):
        async def train_step(self, groups: list[TrainingGroup], learning_rate: float, version: int) -> LearnerStep:
            await super().train_step(groups, learning_rate, version)
            metrics = {"updates": 1.0, "skipped": 0.0}
            return LearnerStep(metrics=metrics, skipped="a loss is not finite", culprits=(groups[0].group_id,))

    told, cluster = Told(), Stopping()
    loop = run_loop(cluster, told, max_staleness=0)
    assert cluster.trained == [list(range(first, first + 4)) for first in range(0, 24, 4)]
    assert told.stopped_for == list(range(0, 24, 4)) and not told.left_out
    assert loop.result.steps == 6 and loop.result.skipped_steps == 0 and loop.result.nonfinite == 6


def test_a_step_of_sick_groups_alone_changes_nothing() -> None:
    loop = run_loop(FakeCluster(sick=frozenset(range(4, 8))), max_staleness=0)
    assert loop.result.skipped_steps == 1 and loop.result.nonfinite == 4


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_held_out_answers_are_measured_beside_training_and_on_policy_before_it(max_staleness: int) -> None:
    told, cluster = Told(), FakeCluster()
    held_out = FakeHeldOut(cluster)
    run_loop(cluster, told, held_out=held_out, max_staleness=max_staleness)
    measured = [(m["held_out/version"], m["held_out/jaccard"]) for m in told.metrics if "held_out/version" in m]
    versions = [version for version, _ in measured]
    assert versions[-1] == 6 and set(versions) <= {0, 2, 4, 6}
    assert any(held_out.measured_while_trained) == (max_staleness > 0)
    if max_staleness == 0:
        assert versions == [0, 2, 4, 6] and all(version == jaccard for version, jaccard in measured)


@pytest.mark.parametrize(("every", "written"), [(4, [3, 4]), (0, [])])
def test_a_checkpoint_that_is_asked_for_follows_the_step_under_way(every: int, written: list[int]) -> None:
    cluster = FakeCluster()
    cluster.wants_checkpoint_in = 2
    run_loop(cluster, checkpoint_every=every)
    assert cluster.checkpoints == written


def test_checkpoints_are_written_when_due_and_each_step_says_where_its_time_went() -> None:
    told, cluster = Told(), FakeCluster()
    run_loop(cluster, told, checkpoint_every=4)
    assert cluster.checkpoints == [4]
    for name in (
        "wait_groups",
        "train",
        "publish",
        "probe",
        "step",
        "wait_slots",
        "loop_cpu",
        "driver_cpu",
        "reward_busy",
        "reference_busy",
    ):
        assert f"seconds/{name}" in told.metrics[0]
    assert sum(m["staleness/groups_at_0"] for m in told.metrics if "staleness/groups_at_0" in m) >= 4
    assert told.metrics[0]["reward_equal_groups/jaccard"] == 0


def test_overlong_completions_are_punished_in_the_advantages_alone() -> None:
    told, cluster = Told(), FakeCluster()
    overlong = OverlongConfig(weight=2.0, buffer_tokens=1)
    run_loop(cluster, told, frozenset(range(100)), overlong=overlong)
    # All are three tokens long, the limit: each loses 2, so that no advantage changes, and the reward is as scored.
    assert told.metrics[0]["reward/total"] == 1.0
    assert all(not group.advantages.any() for group in cluster.last_batch)


GROUPS = st.frozensets(st.integers(0, 30), max_size=6)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(0, 2), GROUPS, GROUPS, GROUPS)
def test_whatever_fails_or_is_slow_each_group_is_trained_once_within_the_bound(
    seed: int, max_staleness: int, max_replaced: int, fail: frozenset[int], equal: frozenset[int], sick: frozenset[int]
) -> None:
    told, cluster = Told(), FakeCluster(seed, fail=fail, sick=sick, train_s=0.001)
    settings = {"max_staleness": max_staleness, "dynamic_sampling": DynamicSamplingConfig(max_replaced=max_replaced)}
    loop = run_loop(cluster, told, equal, held_out=FakeHeldOut(cluster), max_nonfinite_groups=100, **settings)
    assert loop.result.steps == 6 == len(told.metrics)
    trained = [group for step in cluster.trained for group in step]
    given_up = [group_id for group_id, _, _ in told.given_up]
    ends = Counter([*trained, *given_up, *told.made_way, *told.left_out])
    assert set(ends.values()) == {1}, "each group has one end"
    assert set(ends) == set(range(len(ends))), "and none is lost"
    assert max(cluster.staleness, default=0) <= max_staleness
    assert not set(trained) & (fail | sick)
    assert set(given_up) == fail & set(ends)
    assert len(told.made_way) == loop.result.replaced <= 6 * max_replaced


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 5), GROUPS, GROUPS)
def test_a_run_that_goes_on_from_a_checkpoint_loses_and_repeats_no_group(
    seed: int, max_staleness: int, at: int, fail: frozenset[int], equal: frozenset[int]
) -> None:
    settings = {
        "max_staleness": max_staleness,
        "checkpoint_every": 1,
        "dynamic_sampling": DynamicSamplingConfig(max_replaced=1),
    }
    first, told = FakeCluster(seed, fail=fail, train_s=0.001), Told()
    run_loop(first, told, equal, **settings)
    assert first.checkpoints == [1, 2, 3, 4, 5]
    later, told_later = FakeCluster(seed + 1, fail=fail, train_s=0.001, first=at), Told(first_step=at)
    loop = run_loop(later, told_later, equal, state=first.states[at], **settings)
    assert loop.result.steps == 6 and len(loop.result.rewards) == 6 and loop.result.completions == 96
    trained = [group for step in [*first.trained[:at], *later.trained] for group in step]
    assert len(trained) == len(set(trained)) == 24
    assert max(later.staleness, default=0) <= max_staleness
    asked = {**first.asked, **later.asked}
    assert all(later.asked[group] == prompt for group, prompt in first.asked.items() if group in later.asked), (
        "the same id has the same prompt"
    )
    assert set(asked) == set(range(len(asked)))
    if max_staleness == 0:
        assert [*first.trained[:at], *later.trained] == first.trained


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("with_reference", [False, True])
def test_groups_that_waited_fit_those_of_a_run_with_or_without_a_reference(
    max_staleness: int, with_reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = FakeEngines.generate

    async def hang(self: FakeEngines, prompt: Prompt, group_id: int, num_completions: int) -> tuple[GroupHeader, int]:
        await asyncio.sleep(60 if group_id >= 10 else 0)
        return await generate(self, prompt, group_id, num_completions)

    settings = {"max_staleness": max_staleness, "checkpoint_every": 4}
    first, later = FakeCluster(), FakeCluster(1, first=2)
    with monkeypatch.context() as patch:
        patch.setattr(FakeEngines, "generate", hang)
        run_loop(first, end="stop", after_s=1.0, with_reference=not with_reference, **settings)
    assert [group.header.group_id for group in first.states[2][1]] == [8, 9]
    run_loop(later, Told(first_step=2), state=first.states[2], with_reference=with_reference, **settings)
    assert sorted(group for step in later.trained for group in step) == list(range(8, 24))
    assert ({8, 9} <= later.asked.keys()) == with_reference, "what lacks them is made again"
    assert later.staleness and max(later.staleness) <= max_staleness


def test_prompts_are_drawn_once_an_epoch_across_a_resume() -> None:
    first, later = FakeCluster(), FakeCluster(1, first=2)
    run_loop(first, checkpoint_every=2, max_staleness=2)
    run_loop(later, Told(first_step=2), state=first.states[2], checkpoint_every=2, max_staleness=2)
    prompts = [{**first.asked, **later.asked}[group] for group in range(20)]
    assert all(sorted(prompts[start : start + 5]) == [f"p{i}" for i in range(5)] for start in range(0, 20, 5))


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.sampled_from(["kill", "stop"]), st.floats(0.0, 0.03), st.integers(0, 3)), min_size=1, max_size=6
    ),
    st.integers(1, 3),
    st.integers(0, 3),
    GROUPS,
    GROUPS,
)
def test_a_run_that_is_killed_and_stopped_again_and_again_trains_each_group_once(
    seed: int,
    ends: list[tuple[str, float, int]],
    every: int,
    last_bound: int,
    fail: frozenset[int],
    equal: frozenset[int],
) -> None:
    """Each life has a bound on staleness of its own. What the journal says of the steps of a checkpoint stays."""
    journal, ended, asked = list[list[int]](), set[int](), dict[int, str]()
    state, at, before = None, 0, 0
    limit = DynamicSamplingConfig(max_replaced=1)
    for life, (end, after_s, bound) in enumerate([*ends, ("", 0.0, last_bound)]):
        cluster, told = FakeCluster(seed + life, fail=fail, train_s=0.001, first=at), Told(first_step=at)
        settings = {"max_staleness": bound, "checkpoint_every": every, "dynamic_sampling": limit}
        run_loop(cluster, told, equal, state=state, end=end, after_s=after_s, **settings)
        assert max(cluster.staleness, default=0) <= bound
        assert cluster.newest is None or cluster.newest <= at + len(told.metrics), "the journal has its steps"
        assert all(asked.setdefault(group, prompt) == prompt for group, prompt in cluster.asked.items())
        if state is not None and bound >= before:
            assert not {group.header.group_id for group in state[1]} & cluster.asked.keys(), "finished, and made again"
        if end == "stop" and 0 < len(cluster.trained) < 6 - at:
            assert cluster.newest == at + len(cluster.trained) == at + len(told.metrics), "a stop loses no step"
        last = 6 if not end else cluster.newest if cluster.newest is not None else at
        journal += cluster.trained[: last - at]
        ended |= {*(group for group, _, _ in told.given_up), *told.made_way}
        if end and last > at:
            state, at, before = cluster.states[last], last, bound
        if end:
            is_known = GroupLedger.known(state[0]) if state is not None else lambda group: False
            ended = {group for group in ended if is_known(group)}
    trained = [group for step in journal for group in step]
    assert len(trained) == len(set(trained)) == 24
    assert not set(trained) & ended
    assert set(trained) | ended | cluster.asked.keys() >= set(range(max(trained))), "no prompt is skipped"
