"""The rollout generator as a Ray actor: a group with its header, an update, and the faults it reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import random_item, small_config, small_model, small_tokenizer, study_prompt

from actors.rollout_generator import RolloutGenerator
from medtvt_rl.config import Config
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.weights import pack_weights

pytestmark = [pytest.mark.engine, pytest.mark.cluster]
HERE = str(Path(__file__).parent)
MODEL_TESTS = str(Path(__file__).parents[1] / "model")


class SmallItems:
    """An item source: the number in the item's id is its seed."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def get(self, item_id: str) -> dict[str, Any]:
        return random_item(int(item_id.removeprefix("s")))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    small_model(small_config(), small_tokenizer(), 0).save(folder)
    small_tokenizer().save_pretrained(folder)
    config = Config()
    config.run.root = str(tmp_path_factory.mktemp("runs"))
    config.task.items = "test_rollout_generator:SmallItems"
    config.rollout.engine = EngineConfig(max_model_len=64, kv_cache_bytes=1 << 25, max_num_seqs=16)
    config.rollout.sampling = SamplingConfig(max_new_tokens=12)
    environment = {"env_vars": {"PYTHONPATH": f"{HERE}:{MODEL_TESTS}"}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    actor = RolloutGenerator.options(num_cpus=1, runtime_env=environment).remote(str(folder), config, 3)
    yield actor
    ray.shutdown()


def test_generates_updates_and_reports(generator: Any) -> None:
    assert ray.get(generator.health.remote(), timeout=60)["broken"] == "not started"
    assert ray.get(generator.warm.remote(None, True), timeout=300), "as a spare it has its imports done"
    info = ray.get(generator.start.remote(), timeout=300)
    assert info.pid > 0 and info.node

    calls = [generator.generate.remote(study_prompt(i), 10 + i, 4) for i in range(3)]
    headers = ray.get([header for header, _ in calls], timeout=60)
    groups = ray.get([payload for _, payload in calls], timeout=60)
    for header, group in zip(headers, groups):
        assert header.group_id == group.group_id and header.prompt_id == group.prompt.prompt_id
        assert header.lengths == tuple(len(c.token_ids) for c in group.completions)
        assert (header.oldest_version, header.newest_version) == (0, 0)

    buffer = pack_weights(5, named_weights(small_model(small_config(), small_tokenizer(), 1)))
    reference = ray.put(buffer)
    assert ray.get(generator.update_weights.remote(reference, 5), timeout=60) == buffer.checksum
    header, payload = generator.generate.remote(study_prompt(0), 10, 4)
    assert ray.get(header, timeout=60).oldest_version == 5
    changed = ray.get(payload, timeout=60)
    assert [c.token_ids.tolist() for c in changed.completions] != [c.token_ids.tolist() for c in groups[0].completions]

    with pytest.raises(ValueError, match="announced"):
        ray.get(generator.update_weights.remote(reference, 6), timeout=60)
    header, payload = generator.generate.remote(study_prompt(0, length=100), 11, 4)
    with pytest.raises(ValueError, match="max_model_len"):
        ray.get(header, timeout=60)

    short = SamplingConfig(max_new_tokens=3)
    header, _ = generator.generate.remote(study_prompt(0), 12, 2, greedy=True, sampling=short)
    assert max(ray.get(header, timeout=60).lengths) <= 3
    health, stats = ray.get([generator.health.remote(), generator.stats.remote()], timeout=60)
    assert health == {"index": 3, "ok": True, "broken": None, "version": 5}
    assert stats["tokens_generated"] > 0 and stats["num_running"] == 0
