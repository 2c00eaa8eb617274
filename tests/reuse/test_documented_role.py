"""The role and the engine of docs/reuse.md as real actors: they serve, die and are replaced as the packages' own do."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.placement import place, plan
from actors.rollout_pool import RolloutPool
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config
from medtvt_rl.data.tokenizer import byte_tokenizer
from medtvt_rl.learner.scoring import ScoredSequence, score_sequences
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.named_weights import unmerged_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.types import Prompt, RolloutGroup
from medtvt_rl.weights import pack_weights
from pipelines.plan import actors_of
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.cluster
PROJECT = Path(__file__).parents[2]
TOLERANCE, VERSION = 1e-4, 3
PROMPT = Prompt(prompt_id="p", token_ids=np.array([1, 8, 9], np.int32), item_id=None, ground_truth="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tiny_llama(len(tokenizer), initializer_range=0.3, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = Config()
    config.run.root = str(tmp_path_factory.mktemp("runs"))
    config.task.items = None
    config.rewards = {"right": RewardConfig(function="configs.text_task:right")}
    config.rollout.make_engine, config.rollout.spares = "plain_engine:PlainEngine", 1
    config.rollout.sampling = SamplingConfig(max_new_tokens=12)
    config.grpo.layout = "memory_role:MemoryLayout"
    return config


@pytest.fixture(scope="module")
def cluster(written: Path) -> Iterator[None]:
    """A local Ray whose workers find the files of the docs."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(written), str(PROJECT), *filter(None, [before])])
    try:
        ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        yield
    finally:
        ray.shutdown()
        os.environ["PYTHONPATH"] = before


async def pid_of(handle: Any) -> int:
    return int(await handle.__ray_call__.remote(lambda actor: os.getpid()))


async def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, f"waited 120 s for {what}"
        await asyncio.sleep(0.05)


async def killed_engine(config: Config, folder: Path, policy: Any) -> dict[str, Any]:
    """A group, and the same again after the generator died and its spare took its place; what was told meanwhile."""
    told: list[str] = []
    placement = place(plan(config, {"rollout": 1}), config.placement, print)
    pool = await RolloutPool.start(config, placement, folder, Incidents(told.append), with_spares=True)
    assert pool._spares is not None
    waiting = pool._spares._waiting
    try:
        buffer = pack_weights(VERSION, unmerged_weights(policy))
        await pool.update_weights(ray.put(buffer), VERSION, buffer.checksum)
        header, payload = await pool.generate(PROMPT, 5, 4)
        found: dict[str, Any] = {"header": header, "group": await payload, "told": told}
        await until(lambda: 0 in waiting, "the spare")
        spare = await pid_of(waiting[0])
        os.kill(await pid_of(pool._roster.serving[0].handle), signal.SIGKILL)
        header, payload = await pool.generate(PROMPT, 5, 4)
        found |= {"again": await payload, "versions": (header.oldest_version, header.newest_version)}
        found["took_over"] = spare == await pid_of(pool._roster.serving[0].handle)
        found["scored"] = await pool.score(ray.put(found["group"]), 0)
        return found
    finally:
        pool.stop()
        placement.release()


def test_an_engine_of_one_s_own_is_replaced_by_its_spare_with_the_newest_weights(
    cluster: None, config: Config, folder: Path
) -> None:
    policy = load_policy(folder, lora=LoraSettings(rank=2, train_embeddings=False))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found = asyncio.run(killed_engine(config, folder, policy))
    group: RolloutGroup = found["group"]
    sequences = [ScoredSequence(prompt_ids=PROMPT.token_ids, completion_ids=c.token_ids) for c in group.completions]
    expected = [scores.numpy() for scores in score_sequences(policy, sequences, None, 1.0, 4096)]
    for completion, again, scores in zip(group.completions, found["again"].completions, expected):
        assert np.abs(completion.behaviour_logprobs - scores).max() < TOLERANCE
        assert again.token_ids.tolist() == completion.token_ids.tolist(), "the seeds are those of the group"
    assert np.abs(found["scored"][0] - expected[0]).max() < TOLERANCE
    assert found["versions"] == (VERSION, VERSION) and found["took_over"]
    lost, back = found["told"]
    assert lost.startswith("rollout 0 is lost: ActorDiedError")
    assert back == f"rollout 0 serves again, from version {VERSION} on"


async def scored_twice(config: Config, folder: Path, layout: Any) -> tuple[list[Any], Incidents]:
    """The rewards of a group given three times, the memory killed before the third."""
    incidents = Incidents(lambda line: None)
    bundles = [bundle for bundle in layout.bundles(config) if bundle.role in ("reward", "memory")]
    placement = place(bundles, config.placement, print)
    scoring = await layout.start_scoring(layout, config, placement, folder, incidents, Timeline())
    try:
        found = [await scoring.score(group_of_two()) for _ in range(2)]
        os.kill(await pid_of(scoring._memory._roster.serving[0].handle), signal.SIGKILL)
        return [*found, await scoring.score(group_of_two())], incidents
    finally:
        scoring.stop()
        placement.release()


def group_of_two() -> Any:
    from medtvt_rl.types import Completion

    completions = tuple(
        Completion(
            completion_id=f"0/{index}",
            token_ids=np.array(ids, np.int32),
            behaviour_logprobs=np.zeros(len(ids), np.float32),
            policy_versions=np.zeros(len(ids), np.int32),
            finish_reason="stop",
        )
        for index, ids in enumerate(([40, 41], [50]))
    )
    return ray.put(RolloutGroup(group_id=0, prompt=PROMPT, completions=completions))


def test_a_role_of_one_s_own_scores_beside_the_others_and_is_replaced(
    cluster: None, config: Config, folder: Path
) -> None:
    from memory_role import MemoryLayout  # type: ignore[import-not-found]

    assert "memory 0: 0.1 CPU" in actors_of(config, ["grpo"])
    (first, second, third), incidents = asyncio.run(scored_twice(config, folder, MemoryLayout))
    assert set(first.components) == {"right", "rarity"}
    assert first.components["rarity"].tolist() == [1, 1] and second.components["rarity"].tolist() == [0.5, 0.5]
    np.testing.assert_allclose(first.total - second.total, 0.05, atol=1e-6)
    assert third.components["rarity"].tolist() == [1, 1], "its successor has seen nothing"
    (incident,) = incidents.over
    assert (incident.role, incident.outcome) == ("memory", "replaced")
    assert incidents.metrics()["restarts/memory"] == 1
