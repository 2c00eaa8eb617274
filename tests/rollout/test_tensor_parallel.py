"""One engine over two workers: its log-probs are the model's, before weights of a learner come and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from medtvt_rl.config_checks import ConfigError
from medtvt_rl.data.tokenizer import byte_tokenizer
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.vllm_core import prepare_environment
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Prompt, RolloutGroup
from medtvt_rl.weights import LowRank, pack_weights
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.engine
ENGINE = EngineConfig(max_model_len=64, kv_cache_bytes=1 << 26, max_num_seqs=8)
PROMPT = Prompt(prompt_id="p", token_ids=np.arange(5, 20, dtype=np.int32), item_id=None, ground_truth="")
ADAPTED = "model.layers.1.self_attn.o_proj.weight"


def model(seed: int) -> LlamaForCausalLM:
    # Heads of 32: vLLM's attention on a CPU knows none smaller.
    return tiny_llama(len(byte_tokenizer()), hidden_size=64, seed=seed, initializer_range=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model(0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[VllmEngine]:
    prepare_environment(1, cpu=True)
    with VllmEngine(folder, ENGINE, tensor_parallel=2) as started:
        yield started


def generate(engine: VllmEngine, group_id: int) -> RolloutGroup:
    return engine.submit(PROMPT, None, group_id, 3, 0, SamplingConfig(max_new_tokens=16)).result()


@torch.no_grad()
def check(policy: LlamaForCausalLM, engine: VllmEngine, group: RolloutGroup) -> None:
    for completion in group.completions:
        whole = np.concatenate([PROMPT.token_ids, completion.token_ids])
        ids = torch.from_numpy(whole).long()[None]
        logits = policy(ids).logits[0, len(PROMPT.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[0, len(PROMPT.token_ids) :, None])[:, 0]
        np.testing.assert_allclose(completion.behaviour_logprobs, expected.numpy(), atol=1e-4, rtol=0)
        assert set(completion.policy_versions.tolist()) == {engine.version}
        probe = Prompt(prompt_id="q", token_ids=whole, item_id=None, ground_truth="")
        scored = engine.score(probe, None, len(completion.token_ids)).result()
        np.testing.assert_allclose(scored, expected.numpy(), atol=1e-4, rtol=0)


@pytest.mark.long
def test_every_worker_takes_its_part_of_new_weights_and_of_an_adapter(engine: VllmEngine) -> None:
    check(model(0), engine, generate(engine, 0))
    trained = model(1)
    buffer = pack_weights(1, named_weights(trained))
    assert engine.update_weights(buffer, "continue") == buffer.checksum and engine.version == 1
    check(trained, engine, generate(engine, 1))
    # The engine adds an adapter to the weight of its folder, each worker to its part.
    draws = torch.Generator().manual_seed(0)
    low_rank = LowRank(
        down=torch.randn(4, 64, generator=draws), up=torch.randn(64, 4, generator=draws), scale=0.1, dtype=torch.float32
    )
    adapted = dict(named_weights(trained)) | {ADAPTED: low_rank}
    with torch.no_grad():
        trained.get_parameter(ADAPTED).copy_(
            model(0).get_parameter(ADAPTED) + low_rank.scale * (low_rank.up @ low_rank.down)
        )
    buffer = pack_weights(2, adapted.items())
    assert engine.update_weights(buffer, "continue") == buffer.checksum
    check(trained, engine, generate(engine, 2))


def test_heads_that_do_not_divide_are_one_line_before_vllm_starts(folder: Path) -> None:
    prepare_environment(1, cpu=True)
    with pytest.raises(ConfigError, match=r"tensor_parallel is 3: the model in .* has 2 attention heads.*one of 1, 2$"):
        VllmEngine(folder, ENGINE, tensor_parallel=3)
