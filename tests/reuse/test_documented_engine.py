"""The engine and the modality of docs/reuse.md: what the engine samples is what the learner scores, item included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.config import Config
from medtvt_rl.learner.grpo_learner import GrpoLearner
from medtvt_rl.model.config import LoraSettings
from medtvt_rl.model.named_weights import unmerged_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.rollout.pending import EngineBrokenError
from medtvt_rl.types import Prompt, RolloutGroup, TrainingSequence
from medtvt_rl.weights import WeightBufferError, pack_weights
from tests.learner.tiny_policy import PlainEngine as PlainTrainer
from tests.tiny_llama import tiny_llama

END, DIAL = 2, 9
SAMPLING = SamplingConfig(max_new_tokens=6, temperature=0.7)
TOLERANCE = 1e-4


def a_config() -> Config:
    config = Config()
    config.rollout.sampling = SAMPLING
    config.grpo.loss.kl.coefficient = 0
    return config


def a_prompt(item_id: str | None = None) -> Prompt:
    ids = np.array([1, DIAL, 5], np.int32)
    return Prompt(prompt_id="p", token_ids=ids, item_id=item_id, ground_truth="")


def a_group(engine: Any, count: int, item: Any = None, greedy: bool = False, first: int = 0) -> RolloutGroup:
    prompt = a_prompt("3" if item else None)
    found: RolloutGroup = engine.submit(prompt, item, 7, count, 0, SAMPLING, greedy, first).result()
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_llama(20, initializer_range=0.3, eos_token_id=END).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def dial(written: Path, tmp_path: Path) -> tuple[Path, Any]:
    """The folder of a model that reads dials, and the source of its items."""
    import dial  # type: ignore[import-not-found]

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": END, "dial_token_id": DIAL}
    dial.DialModel(dial.DialConfig(**sizes, **layers)).save(tmp_path / "dial")
    return tmp_path / "dial", dial.Dials(a_config())


@pytest.fixture
def make(written: Path) -> Any:
    import plain_engine  # type: ignore[import-not-found]

    return plain_engine.PlainEngine


def learner_on(folder: Path, items: Any = None, lora: LoraSettings | None = None) -> GrpoLearner:
    return GrpoLearner(PlainTrainer(load_policy(folder, lora=lora)), items, a_config())


def gap(learner: GrpoLearner, engine: Any, group: RolloutGroup, item: Any = None) -> float:
    """The largest difference of log-probs at temperature 1, engine against learner."""
    worst = 0.0
    for completion in group.completions:
        ids = np.concatenate([group.prompt.token_ids, completion.token_ids])
        whole = Prompt(prompt_id="p", token_ids=ids, item_id=group.prompt.item_id, ground_truth="")
        found = engine.score(whole, item, len(completion.token_ids)).result()
        worst = max(worst, float(np.abs(found - learner.score(group.prompt, completion)).max()))
    return worst


def train(learner: GrpoLearner, group: RolloutGroup, version: int = 0) -> None:
    """A step from `version` on a group of it, whose tokens were sampled at the temperature that they are scored at."""
    sequences = [
        TrainingSequence(group_id=7, prompt=group.prompt, completion=c, advantage=a, reference_logprobs=None)
        for c, a in zip(group.completions, (1.0, -1.0))
    ]
    tokens = sum(len(sequence.completion.token_ids) for sequence in sequences)
    step = Denominators(num_sequences=2, num_tokens=tokens, max_new_tokens=6)
    found = learner.train_step(sequences, step, 0.02, version)
    assert found.skipped is None and found.metrics["fresh_gap_max"] < TOLERANCE


def test_a_text_depends_on_its_seed_alone_and_ends_where_the_model_ends_it(make: Any, llama: Path) -> None:
    engine = make(str(llama), a_config(), 4)
    whole = a_group(engine, 16)
    part = a_group(engine, 2, first=3)
    assert [c.completion_id for c in part.completions] == ["7/3", "7/4"]
    for made, again in zip(whole.completions[3:5], part.completions):
        assert made.token_ids.tolist() == again.token_ids.tolist()
    assert len({tuple(c.token_ids.tolist()) for c in whole.completions}) > 8, "the seeds must matter"
    reasons = {c.finish_reason for c in whole.completions}
    assert reasons == {"stop", "length"}
    for completion in whole.completions:
        assert (completion.token_ids[-1] == END) == (completion.finish_reason == "stop")
        assert END not in completion.token_ids[:-1] and set(completion.policy_versions) == {4}
    greedy = a_group(engine, 2, greedy=True).completions
    assert greedy[0].token_ids.tolist() == greedy[1].token_ids.tolist()
    stats = engine.stats()
    assert stats["tokens_generated"] == whole.num_tokens + part.num_tokens + sum(len(c.token_ids) for c in greedy)


@pytest.mark.parametrize("rank", [0, 4])
def test_after_a_step_the_engine_holds_what_the_learner_sent(make: Any, llama: Path, rank: int) -> None:
    lora = LoraSettings(rank=rank, train_embeddings=False)
    engine, learner = make(str(llama), a_config(), 0), learner_on(llama, lora=lora)
    for version in (1, 2):
        group = a_group(engine, 2)
        train(learner, group, version - 1)
        assert gap(learner, engine, group) > 10 * TOLERANCE, "the step must have moved the policy"
        buffer = pack_weights(version, unmerged_weights(learner.engine.policy))
        assert engine.update_weights(buffer, "continue") == buffer.checksum and engine.version == version
        assert gap(learner, engine, group) < TOLERANCE


def test_damage_is_told_and_weights_of_another_model_break_it(make: Any, llama: Path) -> None:
    engine, policy = make(str(llama), a_config(), 0), load_policy(llama)
    buffer = pack_weights(1, unmerged_weights(policy))
    damaged = buffer.with_data(np.zeros_like(buffer.data))
    with pytest.raises(WeightBufferError):
        engine.update_weights(damaged, "continue")
    assert engine.broken is None and a_group(engine, 1).completions
    with pytest.raises(EngineBrokenError, match="do not fit"):
        engine.update_weights(pack_weights(1, [("model.norm.weight", torch.zeros(3))]), "continue")
    with pytest.raises(EngineBrokenError, match="version 1 do not fit"):
        a_group(engine, 1)


def test_a_model_that_reads_a_dial_learns_and_samples_with_it(make: Any, dial: tuple[Path, Any]) -> None:
    folder, items = dial
    engine, learner = make(str(folder), a_config(), 0), learner_on(folder, items)
    item, other = items.get("3"), items.get("4")
    group = a_group(engine, 2, item)
    assert gap(learner, engine, group, item) < TOLERANCE
    assert gap(learner, engine, group, other) > 10 * TOLERANCE, "the dial must matter"
    before = learner.engine.policy.reader.weight.detach().clone()  # type: ignore[union-attr, operator]
    train(learner, group)
    assert not torch.equal(before, learner.engine.policy.reader.weight), "the encoder learns, too"  # type: ignore[arg-type]
    buffer = pack_weights(1, unmerged_weights(learner.engine.policy))
    assert engine.update_weights(buffer, "continue") == buffer.checksum
    assert gap(learner, engine, group, item) < TOLERANCE
    learner.engine.policy.save(folder.parent / "trained")  # type: ignore[operator]
    again = load_policy(folder.parent / "trained")
    assert torch.equal(again.reader.weight, learner.engine.policy.reader.weight)  # type: ignore[arg-type]
