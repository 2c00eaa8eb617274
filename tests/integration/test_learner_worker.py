"""The learner gang and the reference policy as Ray actors, on a tiny text model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tiny_llama import tiny_llama

from actors.failure import ActorError
from actors.learner_gang import LearnerError, LearnerGang, shard_groups
from actors.placement import place, plan
from actors.reference_policy import ReferencePolicy
from medtvt_rl.config import Config
from medtvt_rl.learner.scoring import ScoredSequence, score_sequences
from medtvt_rl.learner.step_record import NONFINITE_FOLDER, read_step
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import load_policy
from medtvt_rl.storage import digest_of
from medtvt_rl.types import Completion, GroupHeader, Prompt, RolloutGroup

pytestmark = pytest.mark.cluster
torch.set_num_threads(1)
VOCABULARY, GROUP_SIZE = 64, 3


@dataclass(frozen=True)
class Finished:
    """A group as the driver holds it."""

    header: GroupHeader
    payload: Any
    reference: Any


@dataclass(frozen=True)
class ToTrain:
    """A group with its advantages."""

    group: Finished
    advantages: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand parameters, with a file in the place of its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    settings = {"max_position_embeddings": 64, "tie_word_embeddings": True}
    tiny_llama(VOCABULARY, hidden_size=32, **settings).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two ranks, micro-batches of a few sequences."""
    config = Config()
    config.run.root = str(tmp_path_factory.mktemp("runs"))
    config.task.items = None
    config.learner.num_workers = 2
    config.learner.token_budget = 60
    config.learner.step_timeout_s = 60
    config.placement.learner.cpus = 0.5
    return config


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A local Ray for this file."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def groups(model_folder: Path, config: Config) -> list[RolloutGroup]:
    """Completions with the log-probs that the model itself gives them, as if an engine had sampled them."""
    rng, policy = np.random.default_rng(0), load_policy(model_folder)
    groups = []
    for group_id in range(3):
        prompt = rng.integers(1, VOCABULARY, 4 + group_id).astype(np.int32)
        # The last group has an empty completion, and one of a single token.
        lengths = (0, 1, 5) if group_id == 2 else rng.integers(2, 9, GROUP_SIZE)
        tokens = [rng.integers(1, VOCABULARY, int(length)).astype(np.int32) for length in lengths]
        sequences = [ScoredSequence(prompt_ids=prompt, completion_ids=t) for t in tokens]
        scored = score_sequences(policy, sequences, None, 1.0, 1000)
        completions = tuple(
            Completion(
                completion_id=f"{group_id}/{i}",
                token_ids=t,
                behaviour_logprobs=logprobs.numpy(),
                policy_versions=np.zeros(len(t), dtype=np.int32),
                finish_reason="stop",
            )
            for i, (t, logprobs) in enumerate(zip(tokens, scored))
        )
        named = Prompt(prompt_id=f"p{group_id}", token_ids=prompt, item_id=None, ground_truth="")
        groups.append(RolloutGroup(group_id=group_id, prompt=named, completions=completions))
    return groups


def _to_train(groups: list[RolloutGroup]) -> list[ToTrain]:
    advantages = np.array([1.0, -0.5, -0.5], dtype=np.float32)
    return [
        ToTrain(
            group=Finished(
                header=GroupHeader.of(group, 0.0),
                payload=ray.put(group),
                reference=ray.put(tuple(c.behaviour_logprobs for c in group.completions)),
            ),
            advantages=advantages,
        )
        for group in groups
    ]


@pytest.fixture(scope="module")
def trained(model_folder: Path, config: Config, groups: list[RolloutGroup]) -> dict[str, Any]:
    """The life of a gang: train, checkpoint, train, save; then one rank is killed and a new gang goes on."""
    return asyncio.run(_life(model_folder, config, groups))


async def _life(model_folder: Path, config: Config, groups: list[RolloutGroup]) -> dict[str, Any]:
    placement = place(plan(config, {"learner": 2}), config.placement, print)
    folder, found = config.folder, {}
    gang = await LearnerGang.start(config, placement, model_folder)
    batch = _to_train(groups)
    found["first"] = (await gang.train_step(batch, 1e-3, 0)).metrics
    found["copied"] = await gang.snapshot()
    spoilt = replace(batch[1], advantages=np.full(GROUP_SIZE, np.nan, dtype=np.float32))

    async def go_on() -> None:
        found["spoilt"] = await gang.train_step([batch[0], spoilt, batch[2]], 1e-3, 1)
        await gang.train_step(batch, 1e-3, 1)

    found["files"], _ = await asyncio.gather(gang.write_snapshot(str(folder / "checkpoint")), go_on())
    with pytest.raises(ActorError, match="write_snapshot before snapshot"):
        await gang.write_snapshot(str(folder / "checkpoint"))
    weights, found["checksum"] = await gang.export(2)
    found["weights"] = ray.get(weights)
    await gang.save_model(folder / "saved")
    ray.kill(gang._workers[1])
    with pytest.raises(LearnerError) as error:
        await gang.train_step(batch, 1e-3, 2)
    found["error"] = str(error.value)
    again = await LearnerGang.start(config, placement, model_folder)
    await again.load_checkpoint(str(folder / "checkpoint"))
    await again.train_step(batch, 1e-3, 1)
    _, found["resumed_checksum"] = await again.export(2)
    config.learner.step_timeout_s = 0.0
    with pytest.raises(LearnerError) as late:
        await again.train_step(batch, 1e-3, 2)
    found["late"] = str(late.value)
    config.learner.step_timeout_s = 60
    placement.release()
    return found


def test_a_step_agrees_with_the_engine(trained: dict[str, Any], groups: list[RolloutGroup]) -> None:
    metrics = trained["first"]
    assert metrics["num_sequences"] == 8, "the empty completion teaches nothing"
    assert metrics["num_tokens"] == sum(g.num_tokens for g in groups)
    assert metrics["fresh_tokens"] == metrics["num_tokens"]
    assert metrics["fresh_gap_max"] < 1e-5 and metrics["fresh_not_finite"] == 0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["skipped"] == 0.0 and metrics["gradient_norm"] > 0


def test_a_group_that_is_not_finite_is_named_and_saved(trained: dict[str, Any], config: Config) -> None:
    """That it left no trace shows where a gang that never saw it resumes bitwise."""
    step = trained["spoilt"]
    assert step.culprits == (1,) and step.skipped == "not finite: advantage of group 1"
    assert step.metrics["skipped"] == 1.0 and step.metrics["seconds/fetch"] >= 0
    saved = [read_step(path) for path in sorted((config.folder / "journal" / NONFINITE_FOLDER).glob("*.npz"))]
    sequences = [sequence for record in saved for sequence in record.sequences]
    assert {sequence.group_id for sequence in sequences} == {1} and len(sequences) == 3


def test_exported_weights_are_those_saved(trained: dict[str, Any], config: Config, model_folder: Path) -> None:
    buffer = trained["weights"]
    assert buffer.version == 2 and buffer.verify() == trained["checksum"]
    saved = dict(named_weights(load_policy(config.folder / "saved")))
    start = dict(named_weights(load_policy(model_folder)))
    exported = dict(buffer.tensors())
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert not torch.equal(saved["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert (config.folder / "saved" / "tokenizer.json").read_text() == "{}"


def test_a_new_gang_resumes_bitwise_from_what_was_written_beside_training(
    trained: dict[str, Any], config: Config
) -> None:
    folder = config.folder / "checkpoint"
    assert trained["copied"] and trained["files"] == {path.name: digest_of(path) for path in sorted(folder.iterdir())}
    assert sorted(trained["files"]) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert trained["resumed_checksum"] == trained["checksum"]


def test_failures_name_the_rank_and_the_deadline(trained: dict[str, Any]) -> None:
    assert "of 2, train_step" in trained["error"]
    assert "no answer of ranks [0, 1] in 0 s (learner.step_timeout_s)" in trained["late"]


def test_the_reference_scores_at_the_sampling_temperature(
    model_folder: Path, config: Config, groups: list[RolloutGroup]
) -> None:
    actor: Any = ReferencePolicy
    reference = actor.options(num_cpus=0).remote(str(model_folder), config)
    header, logprobs = ray.get(list(reference.logprobs.remote(ray.put(groups[0]))), timeout=60)
    ray.kill(reference)
    assert header.kl.shape == (GROUP_SIZE,) and np.allclose(header.kl, 0, atol=1e-5) and header.seconds > 0
    for completion, scored in zip(groups[0].completions, logprobs):
        assert np.allclose(scored, completion.behaviour_logprobs, atol=1e-5)


def test_shards_cover_every_completion_once(groups: list[RolloutGroup]) -> None:
    shards = shard_groups(_to_train(groups), 2)
    places = [(s.payload, i) for rank in shards for s in rank for i in s.indices]
    assert len(places) == len(set(places)) == 9
    with pytest.raises(ValueError, match="20 ranks for 9 completions"):
        shard_groups(_to_train(groups), 20)
