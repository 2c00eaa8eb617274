"""How many groups a second the controller moves: the real loop, pools, rosters, timeline, reporter and journal, with
stand-in actors that answer at once.

    python tests/benchmarks/bench_controller.py [--generators 256] [--steps 12] [--processes 4] [--in-process]

The stand-ins are real Ray actors that return headers and small payloads; several generators share a process, since
256 processes would measure the machine's memory. The driver, with all of its threads, is bound to one core; Ray's own
processes and the stand-ins get the others. `--in-process` leaves Ray out: handles answer within the driver, and what
is left is the project's own code, the controller. `--profile` prints where the driver's main thread spends its time.
The last line says whether the goal is reached: 1,000 groups a second on one core with 256 generators.

    groups/s       by the clock; on a machine of few cores the stand-ins limit it
    groups/CPU s   by the CPU seconds of the driver's process, Ray's threads included: what one core can move
    own CPU        CPU milliseconds of a group in the driver's main thread, in which all of the project's code runs
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.learner_gang import LearnerGang
from actors.learner_worker import WeightHeader
from actors.member import Member
from actors.rollout_pool import RolloutPool
from actors.scoring_pools import ReferencePool, ReferenceRoster, ScorerPool, ScorerRoster
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.data.sampler import PromptSampler
from medtvt_rl.evaluation.alarms import Alarms
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.rollout.counters import EngineCounters
from medtvt_rl.types import Completion, GroupHeader, LearnerStep, Prompt, ReferenceHeader, RolloutGroup
from pipelines.grpo_loop import GrpoLoop
from pipelines.journal import Journal
from pipelines.memory import rare_collections
from pipelines.reporter import Reporter
from pipelines.step_report import StepReport

CHECKSUM = 7
LENGTH = 16
GOAL, GOAL_GENERATORS = 1000, 256


class StandIn:
    """Every role at once; answers at once, with what is small."""

    def __init__(self) -> None:
        self._version = 0

    @ray.method(num_returns=2)
    def generate(
        self, prompt: Prompt, group_id: int, size: int, greedy: bool, first_index: int, wave: Any
    ) -> tuple[GroupHeader, RolloutGroup]:
        tokens, logprobs = np.zeros(LENGTH, dtype=np.int32), np.zeros(LENGTH, dtype=np.float32)
        completions = tuple(
            Completion(
                completion_id=f"{group_id}/{first_index + index}",
                token_ids=tokens,
                behaviour_logprobs=logprobs,
                policy_versions=np.full(LENGTH, self._version, dtype=np.int32),
                finish_reason="stop",
            )
            for index in range(size)
        )
        group = RolloutGroup(group_id=group_id, prompt=prompt, completions=completions)
        return GroupHeader.of(group, 0.0, self._version), group

    def update_weights(self, weights: Any, version: int) -> int:
        self._version = version
        return CHECKSUM

    def stats(self) -> dict[str, float]:
        return EngineCounters().read()

    def score(self, group: RolloutGroup, index: int) -> np.ndarray:
        return np.zeros(LENGTH, dtype=np.float32)

    def rewards(self, group: RolloutGroup) -> GroupRewards:
        size = len(group.completions)
        values = np.arange(size, dtype=np.float32) / np.float32(size)
        names = ("jaccard", "format")
        none = np.zeros(size, dtype=bool)
        return GroupRewards(components=dict.fromkeys(names, values), total=values, failed=none, reasons=(None,) * size)

    @ray.method(num_returns=2)
    def logprobs(self, group: RolloutGroup) -> tuple[ReferenceHeader, tuple[np.ndarray, ...]]:
        size = len(group.completions)
        payload = tuple(np.zeros(LENGTH, dtype=np.float32) for _ in range(size))
        return ReferenceHeader(kl=np.zeros(size, dtype=np.float32), seconds=0.0), payload

    def train_step(self, shards: Any, denominators: Any, learning_rate: float, version: int) -> LearnerStep:
        metrics = {"updates": 1.0, "skipped": 0.0, "kl": 0.0, "entropy": 1.0, "tokens": 1.0}
        return LearnerStep(metrics=metrics)

    @ray.method(num_returns=2)
    def export(self, version: int) -> tuple[WeightHeader, bytes]:
        return WeightHeader(version=version, checksum=CHECKSUM, num_bytes=8, seconds=0.0), b"weights"


class Call:
    """A method of a handle: `.remote` answers with one awaitable, or with the first of two results awaitable."""

    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


class Handle:
    """A stand-in as one role calls it.

    Args:
        call: (method, number of results, arguments) -> results to await.
    """

    def __init__(self, call: Callable[..., Any], score: str = "score") -> None:
        def two(name: str) -> Call:
            return Call(lambda *args, **kwargs: call(name, 2, *args, **kwargs))

        def one(name: str) -> Call:
            return Call(lambda *args, **kwargs: call(name, 1, *args, **kwargs))

        self.generate, self.logprobs, self.export = two("generate"), two("logprobs"), two("export")
        self.update_weights, self.stats, self.score = one("update_weights"), one("stats"), one(score)
        self.train_step = one("train_step")


def in_process() -> Callable[..., Any]:
    """Calls that this process answers."""
    actor = StandIn()

    async def answer(value: Any) -> Any:
        await asyncio.sleep(0)
        return value

    def call(name: str, num_results: int, *args: Any, **kwargs: Any) -> Any:
        result = getattr(actor, name)(*args, **kwargs)
        if num_results == 1:
            return answer(result)
        return answer(result[0]), result[1]

    return call


def by_ray() -> Callable[..., Any]:
    """Calls that an actor of its own process answers."""
    actor: Any = ray.remote(num_cpus=0)(StandIn).remote()
    methods = {name: getattr(actor, name) for name in dir(StandIn) if not name.startswith("_")}

    def call(name: str, num_results: int, *args: Any, **kwargs: Any) -> Any:
        return methods[name].remote(*args, **kwargs)

    return call


class Words:
    """A tokenizer, for the sample of the journal."""

    def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
        return "words"


class Steps(StepReport):
    """The run's own report, and the clocks at the end of every step."""

    ends: list[tuple[float, float, float]]

    def step(self, trained: Any) -> None:
        super().step(trained)
        self.ends.append((time.perf_counter(), time.process_time(), time.thread_time()))


def main() -> None:
    """Runs the loop and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=256)
    parser.add_argument("--scorers", type=int, default=64, help="reward scorers, and as many references")
    parser.add_argument("--groups", type=int, default=1024, help="of a step")
    parser.add_argument("--steps", type=int, default=12, help="5 or more")
    parser.add_argument("--processes", type=int, default=4, help="that the stand-ins share")
    parser.add_argument("--in-process", action="store_true", help="leave Ray out")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if not args.in_process:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    calls = [in_process() if args.in_process else by_ray() for _ in range(args.processes)]
    if not args.in_process:
        ray.get([call("stats", 1) for call in calls], timeout=120)
    bind_to_one_core()
    with tempfile.TemporaryDirectory(prefix="bench_controller_") as folder:
        profile = cProfile.Profile()
        with profile if args.profile else nullcontext(), rare_collections():
            ends = asyncio.run(run(args, Path(folder), calls))
    found = print_table(ends, args.groups)
    print(verdict(*found, args.generators, with_ray=not args.in_process))
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    if not args.in_process:
        ray.shutdown()


def bind_to_one_core() -> None:
    """All threads of this process; what it starts later would be bound, too."""
    core = max(os.sched_getaffinity(0))
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


async def run(
    args: argparse.Namespace, folder: Path, calls: list[Callable[..., Any]]
) -> list[tuple[float, float, float]]:
    """The clocks (wall, CPU of the process, CPU of its main thread) at the end of every step."""
    config = Config()
    config.run.root, config.run.name = str(folder), "controller"
    config.grpo.steps, config.grpo.groups_per_step = args.steps, args.groups
    config.rollout.num_generators = args.generators
    config.grpo.held_out.every_steps = 0
    incidents, timeline = Incidents(print), Timeline()

    def members(count: int, score: str = "score") -> list[Member]:
        return [Member(index=i, handle=Handle(calls[i % len(calls)], score)) for i in range(count)]

    def ended(handle: Any) -> None:
        raise RuntimeError("a stand-in was lost")

    shared: dict[str, Any] = {"kill": ended, "timeline": timeline}
    rollouts = RolloutPool(config, members(args.generators), incidents, **shared)
    scoring = ScorerPool(config, ScorerRoster(config, members(args.scorers, "rewards"), incidents, **shared))
    reference = ReferencePool(config, ReferenceRoster(config, members(args.scorers), incidents, **shared))
    learner = LearnerGang(config, [Handle(calls[0])], timeline)
    ids = np.arange(64, dtype=np.int32)
    prompts = [Prompt(prompt_id=f"p{i}", token_ids=ids, item_id=None, ground_truth="") for i in range(5000)]
    (folder / "controller").mkdir()
    with (
        (folder / "words").open("w") as words,
        Reporter(folder / "controller", stream=words) as reporter,
        Journal(folder / "controller" / "journal", Words()) as journal,  # type: ignore[arg-type]
    ):
        reporter.start("grpo", args.steps)
        report = Steps(reporter, journal, Alarms(config.alarms), incidents)
        report.ends = []
        journal._fetch = lambda payload: ray.get(payload) if isinstance(payload, ray.ObjectRef) else payload
        loop = GrpoLoop(
            config.grpo, 96, PromptSampler(prompts, 0), rollouts, scoring, reference, learner, report, None, None, None
        )
        await loop.run()
        assert loop.result.discarded == 0 and loop.result.steps == args.steps
    return report.ends


def print_table(ends: list[tuple[float, float, float]], groups: int) -> tuple[float, float]:
    """Over the steps between the first two, in which processes and caches warm up, and the last two, for which no
    group is begun any more. Returns groups a second by the clock and by CPU time."""
    first, last = ends[1], ends[-3]
    count = groups * (len(ends) - 4)
    wall_s, cpu_s, own_s = (after - before for before, after in zip(first, last))
    print("groups/s  groups/CPU s  CPU ms a group  own CPU ms a group")
    print(f"{count / wall_s:8.0f}  {count / cpu_s:12.0f}  {1e3 * cpu_s / count:14.3f}  {1e3 * own_s / count:18.3f}")
    return count / wall_s, count / cpu_s


def verdict(per_s: float, per_cpu_s: float, generators: int, with_ray: bool = True) -> str:
    """On the goal, in a line."""
    goal = f"goal of {GOAL:,} groups a second on one core with {GOAL_GENERATORS} generators"
    goal += ", with Ray's calls" if with_ray else ", without Ray's calls"
    if generators < GOAL_GENERATORS:
        return f"{goal}: not measured, these were {generators}"
    if per_s >= GOAL:
        return f"{goal}: reached, {per_s:,.0f}"
    if per_cpu_s >= GOAL:
        return (
            f"{goal}: reached by CPU time, {per_cpu_s:,.0f} a CPU second; by the clock {per_s:,.0f}, as the driver "
            "waited for the stand-ins or for its core"
        )
    return f"{goal}: not reached, {per_s:,.0f}, and {per_cpu_s:,.0f} a CPU second"


if __name__ == "__main__":
    main()
