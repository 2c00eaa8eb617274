"""The pool over two real engines: a group in parts, and a generator that is killed while it generates."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import small_tokenizer
from tiny_llama import tiny_llama

from actors.placement import place, plan
from actors.rollout_pool import RolloutPool
from actors.supervision import Incidents
from medtvt_rl.config import Config
from medtvt_rl.learner.scoring import ScoredSequence, score_sequences
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.named_weights import unmerged_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.types import Prompt, RolloutGroup
from medtvt_rl.weights import pack_weights

pytestmark = [pytest.mark.engine, pytest.mark.cluster]
TOLERANCE = 1e-4
PROMPT = Prompt(prompt_id="p", token_ids=np.array([1, 8, 9, 10], np.int32), item_id=None, ground_truth="")
GROUP_SIZE, NEW_TOKENS, VERSION = 8, 240, 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(small_tokenizer()), 64, initializer_range=0.2, eos_token_id=2).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    config = Config()
    config.run.root = str(tmp_path_factory.mktemp("runs"))
    config.task.items = None
    config.rollout.num_generators = 2
    config.rollout.max_completions_per_engine = 5
    config.rollout.engine = EngineConfig(max_model_len=256, kv_cache_bytes=1 << 26, max_num_seqs=16)
    config.rollout.sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield asyncio.run(_life(config, folder))
    ray.shutdown()


async def _life(config: Config, folder: Path) -> dict[str, Any]:
    """New weights; a group whole, then in parts; then again with a generator killed at it, until its successor
    serves."""
    policy = load_policy(folder, lora=LoraSettings(rank=4, train_embeddings=False))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    told: list[str] = []
    placement = place(plan(config, {"rollout": 2}), config.placement, print)
    pool = await RolloutPool.start(config, placement, folder, Incidents(told.append))
    members = pool._roster.serving
    buffer = pack_weights(VERSION, unmerged_weights(policy))
    await pool.update_weights(ray.put(buffer), VERSION, buffer.checksum)
    found: dict[str, Any] = {"policy": policy, "told": told}
    whole = members[0].handle.generate.remote(PROMPT, 5, GROUP_SIZE)
    found["whole"] = await whole[0], await whole[1]
    found["parts"] = await _group(pool)
    pid = await members[0].handle.__ray_call__.remote(lambda actor: os.getpid())
    running = asyncio.create_task(_group(pool))
    while (await members[0].handle.stats.remote())["num_running"] == 0:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    found["after_kill"] = await running
    found["left_at_once"] = pool.num_left
    deadline = time.monotonic() + 200
    while pool.num_left < 2 and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    found["scored"] = await pool.score(ray.put(found["whole"][1]), 0)
    successor = members[0].handle.generate.remote(PROMPT, 5, GROUP_SIZE)
    found["successor"] = await successor[0], await successor[1]
    found["health"] = await members[0].handle.health.remote()
    pool.stop()
    return found


async def _group(pool: RolloutPool) -> tuple[Any, RolloutGroup]:
    header, payload = await pool.generate(PROMPT, 5, GROUP_SIZE)
    return header, await payload


def learner_logprobs(policy: Any, group: RolloutGroup) -> list[np.ndarray]:
    sequences = [
        ScoredSequence(prompt_ids=group.prompt.token_ids, completion_ids=c.token_ids) for c in group.completions
    ]
    return [scored.numpy() for scored in score_sequences(policy, sequences, None, 1.0, 4096)]


@pytest.mark.parametrize("made", ["whole", "parts", "after_kill", "successor"])
def test_groups_are_complete_in_order_and_of_the_published_weights(found: dict[str, Any], made: str) -> None:
    header, group = found[made]
    assert [c.completion_id for c in group.completions] == [f"5/{i}" for i in range(GROUP_SIZE)]
    assert header.lengths == tuple(len(c.token_ids) for c in group.completions) and max(header.lengths) > 100
    assert header.num_cut == sum(c.finish_reason == "length" for c in group.completions)
    assert (header.oldest_version, header.newest_version) == (VERSION, VERSION)
    for completion, expected in zip(group.completions, learner_logprobs(found["policy"], group)):
        assert np.abs(completion.behaviour_logprobs - expected).max() < TOLERANCE


@pytest.mark.parametrize("made", ["parts", "after_kill", "successor"])
def test_texts_are_those_of_the_whole_group_wherever_they_are_made(found: dict[str, Any], made: str) -> None:
    """Batches of another shape round differently, so that one text of eight may fall the other way."""
    pairs = list(zip(found["whole"][1].completions, found[made][1].completions))
    equal = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in pairs]
    print(f"{made}: {sum(equal)} of {len(equal)} texts equal")
    assert sum(equal) >= GROUP_SIZE - 1
    assert len({tuple(a.token_ids.tolist()) for a, _ in pairs}) == GROUP_SIZE, "the seeds must matter"


def test_the_successor_serves_the_newest_version_and_agrees_with_the_learner(found: dict[str, Any]) -> None:
    assert found["left_at_once"] == 1 and len(found["scored"]) == 2
    assert found["health"] == {"index": 0, "ok": True, "broken": None, "version": VERSION}
    (_, group), policy = found["whole"], found["policy"]
    for scored in found["scored"]:
        assert np.abs(scored - learner_logprobs(policy, group)[0]).max() < TOLERANCE


def test_what_happened_is_told(found: dict[str, Any]) -> None:
    lost, back = found["told"]
    assert lost.startswith("rollout 0 is lost: ActorDiedError") and "it is started again; 1 left" in lost
    assert back == f"rollout 0 serves again, from version {VERSION} on"
