"""Every way of sending weights to a real engine: it then computes with what the learner has, to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "learner"))
from small_model import random_item, small_config, small_model, small_tokenizer, study_prompt
from test_vllm_engine import ENGINE, SAMPLING, TOLERANCE, difference
from tiny_llama import LLAMA3_ROPE, tiny_llama
from tiny_policy import PlainEngine

from medtvt_rl.learner.export import export_weights
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.tower import set_encoders_trainable
from medtvt_rl.rollout.config import Sent
from medtvt_rl.rollout.vllm_core import prepare_environment
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Prompt, RolloutGroup
from medtvt_rl.weights import WeightBuffer, pack_weights

pytestmark = pytest.mark.engine
KINDS = ("tri-modal, tied", "tri-modal, untied", "text, tied", "text, untied")
ITEM = random_item(0)
TEXT = Prompt(prompt_id="p", token_ids=np.array([1, 8, 9, 10], np.int32), item_id=None, ground_truth="")


class Served:
    """A model folder with an engine that serves it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.item = ITEM if kind.startswith("tri-modal") else None
        self.prompt = TEXT if self.item is None else study_prompt(0)
        self.folder, tie, tokenizer = folder, kind.endswith(", tied"), small_tokenizer()
        if self.item is None:
            settings = {
                "num_key_value_heads": 1,
                "initializer_range": 0.2,
                "tie_word_embeddings": tie,
                "eos_token_id": 2,
            }
            tiny_llama(len(tokenizer), hidden_size=64, **settings).save_pretrained(folder)
        elif tie:
            # Built on a Llama as Llama 3.2 is: grouped heads, scaled rotary positions, tied embeddings.
            settings = {"num_key_value_heads": 1, "initializer_range": 0.08, "rope_parameters": LLAMA3_ROPE}
            llama = tiny_llama(len(tokenizer), hidden_size=64, tie_word_embeddings=True, eos_token_id=2, **settings)
            llama.save_pretrained(folder / "llama")
            config = small_config()
            config.init = str(folder / "llama")
            small_model(config, tokenizer).save(folder)
        else:
            small_model(small_config(tie=tie), tokenizer).save(folder)
        tokenizer.save_pretrained(folder)
        self.engine = VllmEngine(folder, ENGINE)

    def learner(self, train_embeddings: bool, lora: bool = True) -> Any:
        """The folder's policy after some training: adapters, embeddings, tower and its statistics have moved."""
        settings = LoraSettings(rank=4, alpha=10.0, train_embeddings=train_embeddings)
        policy = load_policy(self.folder, lora=settings if lora else None)
        set_encoders_trainable(policy, True)
        torch.manual_seed(7)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
            for name, buffer in policy.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(torch.randn_like(buffer))
                elif name.endswith("running_var"):
                    buffer.mul_(1.5)
        return policy.eval()

    def start_again(self) -> None:
        """The weights of the folder, whatever was loaded since."""
        self.engine.update_weights(pack_weights(0, named_weights(load_policy(self.folder))))

    def group(self) -> RolloutGroup:
        return self.engine.submit(self.prompt, self.item, 0, 4, 0, SAMPLING).result(60)

    def live(self) -> dict[str, torch.Tensor]:
        """A copy of the weights and statistics that the engine computes with."""
        future: Future[Any] = Future()
        core: Any = self.engine._core._engine
        self.engine._send(lambda: future.set_result(core.collective_rpc(copy_of_weights)[0]))
        return future.result(60)


def copy_of_weights(worker: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.model_runner.get_model().state_dict().items()}


def exported(policy: Any, send: Sent, version: int = 3) -> WeightBuffer:
    buffer = export_weights(PlainEngine(policy), version, send)
    assert buffer is not None
    return buffer


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    prepare_environment(1, cpu=True)
    served = Served(request.param, tmp_path_factory.mktemp("model"))
    yield served
    served.engine.close()


@pytest.mark.parametrize("send", get_args(Sent))
def test_the_engine_agrees_with_the_learner_after_each_kind_of_sync(served: Served, send: Sent) -> None:
    served.start_again()
    before = served.group()
    policy = served.learner(train_embeddings=send != "adapter")
    assert difference(policy, before, served.item) > 0.05, "the training must matter"
    buffer = exported(policy, send)
    assert served.engine.update_weights(buffer) == buffer.checksum
    group = served.group()
    assert difference(policy, group, served.item) < TOLERANCE
    assert group.oldest_version == 3


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_adapters_merged_by_the_engine_are_bitwise_those_merged_by_the_learner(
    served: Served, train_embeddings: bool
) -> None:
    policy = served.learner(train_embeddings)
    unmerged: Sent = "trainable" if train_embeddings else "adapter"
    ways: tuple[Sent, ...] = (unmerged, "merged", "full")
    found = []
    for send in ways:
        served.start_again()
        start = served.live()
        served.engine.update_weights(exported(policy, send))
        found.append(served.live())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(found[0][name], other[name]) for name in other)
    moved = {name for name in start if not torch.equal(start[name], found[0][name])}
    assert any("qkv_proj" in name for name in moved) and any("gate_up_proj" in name for name in moved)
    assert any("running_var" in name for name in moved) is (served.item is not None)
    assert any("embed_tokens" in name for name in moved) is train_embeddings


def test_without_adapters_everything_that_learns_arrives(served: Served) -> None:
    served.start_again()
    policy = served.learner(train_embeddings=True, lora=False)
    served.engine.update_weights(exported(policy, "trainable"))
    assert difference(policy, served.group(), served.item) < TOLERANCE


def test_a_group_in_parts_has_the_texts_of_a_whole_one(served: Served) -> None:
    """Rows of other batch shapes round differently, so that a draw at the edge of two tokens may fall either way: of
    96 texts at most four may differ.
    """
    served.start_again()
    equal = total = 0
    for group_id in range(12):
        whole = served.engine.submit(served.prompt, served.item, group_id, 8, 0, SAMPLING).result(60)
        parts = [
            served.engine.submit(served.prompt, served.item, group_id, count, 0, SAMPLING, first_index=first).result(60)
            for first, count in ((0, 3), (3, 5))
        ]
        made = [*parts[0].completions, *parts[1].completions]
        assert [c.completion_id for c in made] == [c.completion_id for c in whole.completions]
        equal += sum(a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(made, whole.completions))
        total += len(made)
    assert len({tuple(c.token_ids.tolist()) for c in whole.completions}) > 4, "the seeds must matter"
    print(f"{equal} of {total} texts equal")
    assert equal >= total - 4
