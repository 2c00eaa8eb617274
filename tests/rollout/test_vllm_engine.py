"""The rollout engine against the Hugging Face model: log-probs, greedy text, seeds, weight updates in every mode."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import collate, random_item, small_config, small_model, small_tokenizer, study_prompt
from tiny_llama import tiny_llama

from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.model.policy import PolicyModel, load_policy
from medtvt_rl.model.token_tree import TokenTree
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.pending import EngineBrokenError, Wave
from medtvt_rl.rollout.vllm_core import prepare_environment
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Completion, Prompt, RolloutGroup
from medtvt_rl.weights import WeightBuffer, WeightBufferError, pack_weights

pytestmark = pytest.mark.engine
TOLERANCE = 1e-4
LONG = 80
ENGINE = EngineConfig(max_model_len=128, kv_cache_bytes=1 << 26, max_num_seqs=64)
SAMPLING = SamplingConfig(max_new_tokens=24)
ITEMS = [random_item(0), random_item(1, (False, True, True)), random_item(2, (True, False, False))]


def start(folder: Path, model: MedTVTForCausalLM) -> VllmEngine:
    prepare_environment(1, cpu=True)
    model.save(folder)
    small_tokenizer().save_pretrained(folder)
    return VllmEngine(folder, ENGINE)


@pytest.fixture(scope="module")
def models() -> list[MedTVTForCausalLM]:
    torch.set_num_threads(1)
    return [small_model(small_config(), small_tokenizer(), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def started(models: list[MedTVTForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    with start(tmp_path_factory.mktemp("model"), models[0]) as engine:
        yield engine


@pytest.fixture
def engine(started: VllmEngine, models: list[MedTVTForCausalLM]) -> VllmEngine:
    """The engine with the weights of version 0, whatever an earlier test loaded."""
    if started.version != 0:
        started.update_weights(weights(models[0], 0))
    return started


def weights(model: MedTVTForCausalLM, version: int) -> WeightBuffer:
    return pack_weights(version, named_weights(model))


@torch.no_grad()
def policy_logprobs(
    model: PolicyModel, prompt: Prompt, item: dict[str, np.ndarray] | None, completion: Completion
) -> torch.Tensor:
    """[T, V] of the Hugging Face model at temperature 1."""
    length = len(prompt.token_ids)
    tree = TokenTree.of([np.concatenate([prompt.token_ids, completion.token_ids])])
    hidden = model.hidden_states(tree, None if item is None else collate([item]))
    return (hidden @ model.output_weight.T)[length - 1 : -1].log_softmax(-1)


def difference(model: PolicyModel, group: RolloutGroup, item: dict[str, np.ndarray] | None) -> float:
    """Largest difference of a sampled token's log-prob; NaN counts as infinite."""
    worst = 0.0
    for completion in group.completions:
        expected = policy_logprobs(model, group.prompt, item, completion)
        picked = expected.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
        gap = (picked - torch.from_numpy(completion.behaviour_logprobs)).abs()
        worst = max(worst, float(gap.nan_to_num(float("inf")).max()))
    return worst


def run(engine: VllmEngine, group_id: int = 0, sampling: SamplingConfig = SAMPLING, **options: bool) -> RolloutGroup:
    index = group_id % len(ITEMS)
    return engine.submit(study_prompt(index), ITEMS[index], group_id, 4, 0, sampling, **options).result()


@contextmanager
def held(engine: VllmEngine) -> Iterator[None]:
    """Lets submissions pile up, so that one step meets them all."""
    release = threading.Event()
    engine._send(lambda: release.wait() and None)
    yield
    release.set()


def texts(group: RolloutGroup) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in group.completions]


@pytest.mark.parametrize("index", range(len(ITEMS)))
def test_sampled_logprobs_equal_the_policy_with_and_without_modalities(
    engine: VllmEngine, models: list[MedTVTForCausalLM], index: int
) -> None:
    group = run(engine, index)
    assert difference(models[0], group, ITEMS[index]) < TOLERANCE
    assert difference(models[0], group, random_item(9)) > 0.01, "the item must matter"
    assert [c.completion_id for c in group.completions] == [f"{index}/{i}" for i in range(4)]


def test_logprobs_are_at_the_sampling_temperature(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    group = run(engine, sampling=dataclasses.replace(SAMPLING, temperature=0.7))
    for completion in group.completions:
        expected = (policy_logprobs(models[0], group.prompt, ITEMS[0], completion) / 0.7).log_softmax(-1)
        picked = expected.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(picked.numpy(), completion.behaviour_logprobs, atol=TOLERANCE)


def test_greedy_takes_the_most_probable_token(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    for index in range(len(ITEMS)):
        group = run(engine, index, greedy=True)
        for completion in group.completions:
            expected = policy_logprobs(models[0], group.prompt, ITEMS[index], completion).argmax(-1)
            assert expected.tolist() == completion.token_ids.tolist()


def test_stop_token_is_kept_and_nothing_is_invented_for_a_cut(engine: VllmEngine) -> None:
    completions = [c for group_id in range(12) for c in run(engine, group_id).completions]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    cut = [c for c in completions if c.finish_reason == "length"]
    assert stopped and cut
    assert all(c.token_ids[-1] == 2 and 2 not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == SAMPLING.max_new_tokens and 2 not in c.token_ids for c in cut)


def test_text_depends_on_run_seed_and_group_not_on_company(engine: VllmEngine) -> None:
    alone = texts(run(engine, 7))
    futures = [engine.submit(study_prompt(i % 3), ITEMS[i % 3], i, 4, 0, SAMPLING) for i in range(12)]
    assert texts(futures[7].result()) == alone
    other_seed = engine.submit(study_prompt(1), ITEMS[1], 7, 4, 1, SAMPLING).result()
    assert texts(other_seed) != alone
    assert len({tuple(text) for text in alone}) > 1


def test_more_prompts_than_fit_one_step(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    """Prompts are computed in parts here, which would end vLLM on a CPU; the seeds must not notice."""
    long = [study_prompt(i, length=90) for i in range(32)]
    with held(engine):
        futures = [engine.submit(p, random_item(50 + i), 100 + i, 2, 0, SAMPLING) for i, p in enumerate(long)]
    groups = [future.result() for future in futures]
    for i in range(0, 32, 4):
        assert difference(models[0], groups[i], random_item(50 + i)) < TOLERANCE
        alone = engine.submit(long[i], random_item(50 + i), 100 + i, 2, 0, SAMPLING).result()
        assert texts(alone) == texts(groups[i])


def test_a_study_is_encoded_once_per_group(engine: VllmEngine) -> None:
    before = engine.num_encoded()
    engine.submit(study_prompt(0), random_item(999), 0, 8, 0, SAMPLING).result()
    assert engine.num_encoded() == before + 1


def test_keys_and_values_of_a_prompt_are_computed_once_per_group(engine: VllmEngine) -> None:
    """Whole blocks of 32 tokens are shared: two of the prompt's 77, by seven of eight completions."""
    before = engine.stats()
    engine.submit(study_prompt(71, length=70), random_item(71), 71, 8, 0, SAMPLING).result()
    gained = {name: value - before[name] for name, value in engine.stats().items()}
    assert gained["prompt_tokens"] == 8 * 77
    assert gained["prompt_tokens_shared"] == 7 * 64


def test_a_wave_is_the_same_bit_for_bit_whatever_was_asked_before_it(
    engine: VllmEngine, models: list[MedTVTForCausalLM]
) -> None:
    """Its prompts begin with 90 tokens of a probe and of a held-out question, whose blocks vLLM keeps."""
    head = study_prompt(0, length=90)
    tails = [[8, 9], [10, 11, 12], [13]]
    whole = [dataclasses.replace(head, token_ids=np.append(head.token_ids, tail).astype(np.int32)) for tail in tails]

    def wave(number: int) -> tuple[list[np.ndarray], float]:
        shared = engine.stats()["prompt_tokens_shared"]
        together = Wave(number=number, size=2)
        futures = [engine.submit(whole[i], ITEMS[0], 40 + i, 4, 0, SAMPLING, wave=together) for i in (1, 0)]
        logprobs = [c.behaviour_logprobs for future in futures for c in future.result(60).completions]
        return logprobs, engine.stats()["prompt_tokens_shared"] - shared

    engine.update_weights(weights(models[0], 0))
    first, shared = wave(1)
    assert shared > 0, "within the wave blocks are shared"
    engine.score(whole[2], ITEMS[0], 4).result(60)
    engine.submit(whole[2], ITEMS[0], 42, 1, 0, SAMPLING, greedy=True).result(60)
    again, shared_again = wave(2)
    assert shared_again == shared
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_update_there_and_back_agrees_with_the_policy(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    first = texts(run(engine))
    for version, model in ((1, models[1]), (2, models[0])):
        buffer = weights(model, version)
        assert engine.update_weights(buffer) == buffer.checksum
        group = run(engine)
        assert difference(model, group, ITEMS[0]) < TOLERANCE
        assert {int(v) for c in group.completions for v in c.policy_versions} == {version}
    assert texts(group) == first


def test_part_of_the_weights_updates_that_part(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    tower = [(name, tensor) for name, tensor in named_weights(models[1]) if name.startswith("study_tower.")]
    mixed = small_model(small_config(), small_tokenizer(), 0)
    mixed.study_tower.load_state_dict(models[1].study_tower.state_dict())
    engine.update_weights(pack_weights(3, tower))
    assert difference(mixed, run(engine), ITEMS[0]) < TOLERANCE


def in_flight_update(engine: VllmEngine, buffer: WeightBuffer, on_update: str) -> RolloutGroup:
    """A long group whose weights change after it began, on a study that the prefix cache has from a finished group."""
    prompt, long = study_prompt(0, length=40), dataclasses.replace(SAMPLING, max_new_tokens=LONG)
    engine.submit(prompt, ITEMS[0], 0, 1, 0, dataclasses.replace(SAMPLING, max_new_tokens=2)).result()
    groups = [engine.submit(prompt, ITEMS[0], g, 8, 0, long) for g in range(8)]
    while engine.stats()["num_running"] == 0:
        time.sleep(0.001)
    time.sleep(0.05)
    engine.update_weights(buffer, on_update)
    finished = [future.result() for future in groups]
    longest = max((c for g in finished for c in g.completions), key=lambda c: len(c.token_ids))
    return next(g for g in finished if any(c is longest for c in g.completions))


def test_requests_in_flight_continue_under_the_new_policy(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    group = in_flight_update(engine, weights(models[1], 1), "continue")
    mixed = [c for c in group.completions if set(c.policy_versions.tolist()) == {0, 1}]
    assert mixed
    for completion in mixed:
        assert (np.diff(completion.policy_versions) >= 0).all()
        for version, model in enumerate(models):
            expected = policy_logprobs(model, group.prompt, ITEMS[0], completion)
            picked = expected.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0].numpy()
            own = completion.policy_versions == version
            gap = np.abs(picked - completion.behaviour_logprobs)
            assert gap[own].max() < TOLERANCE
            assert gap[~own].max() > 0.01


def test_requests_in_flight_finish_under_the_old_policy(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    group = in_flight_update(engine, weights(models[1], 1), "finish")
    assert group.oldest_version == 0 and difference(models[0], group, ITEMS[0]) < TOLERANCE
    assert difference(models[1], run(engine), ITEMS[0]) < TOLERANCE


def test_requests_in_flight_restart_under_the_new_policy(engine: VllmEngine, models: list[MedTVTForCausalLM]) -> None:
    group = in_flight_update(engine, weights(models[1], 1), "restart")
    long = [c for c in group.completions if len(c.token_ids) == LONG]
    assert long and all(set(c.policy_versions.tolist()) == {1} for c in long)
    restarted = dataclasses.replace(group, completions=tuple(long))
    assert difference(models[1], restarted, ITEMS[0]) < TOLERANCE


def test_wrong_checksum_is_refused_and_the_engine_serves_on(
    engine: VllmEngine, models: list[MedTVTForCausalLM]
) -> None:
    damaged = dataclasses.replace(weights(models[1], 1), checksum=1)
    with pytest.raises(WeightBufferError, match="checksum"):
        engine.update_weights(damaged)
    group = run(engine)
    assert group.oldest_version == 0 and difference(models[0], group, ITEMS[0]) < TOLERANCE


def test_prompts_that_cannot_be_served_are_refused_with_a_reason(engine: VllmEngine) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        engine.submit(study_prompt(0, length=200), ITEMS[0], 0, 1, 0, SAMPLING)
    twice = study_prompt(0, tokens_per_modality=4)
    with pytest.raises(ValueError, match="exactly once"):
        engine.submit(twice, ITEMS[0], 0, 1, 0, SAMPLING).result()
    partial = {key: value for key, value in ITEMS[0].items() if key != "lab"}
    with pytest.raises(ValueError, match="lab"):
        engine.submit(study_prompt(0), partial, 0, 1, 0, SAMPLING).result()
    assert run(engine).num_tokens > 0


def test_completion_ends_at_the_model_length(engine: VllmEngine) -> None:
    group = engine.submit(study_prompt(0, length=118), ITEMS[0], 0, 4, 0, SAMPLING).result()
    assert all(len(c.token_ids) <= ENGINE.max_model_len - len(group.prompt.token_ids) for c in group.completions)


def test_scoring_a_completion_agrees_with_the_model_before_and_after_an_update(
    engine: VllmEngine, models: list[MedTVTForCausalLM]
) -> None:
    prompt = study_prompt(0)
    group = engine.submit(prompt, ITEMS[0], 900, 1, 0, SAMPLING).result(60)
    (completion,) = group.completions
    tokens = np.concatenate([prompt.token_ids, completion.token_ids])
    whole = dataclasses.replace(prompt, token_ids=tokens)
    for version, model in enumerate(models):
        if version:
            engine.update_weights(weights(model, version))
        scored = engine.score(whole, ITEMS[0], len(completion.token_ids)).result(60)
        expected = policy_logprobs(model, prompt, ITEMS[0], completion)
        expected = expected.gather(1, torch.from_numpy(completion.token_ids)[:, None].long())[:, 0]
        assert np.abs(scored - expected.numpy()).max() <= TOLERANCE
    with pytest.raises(ValueError, match="cannot score the last"):
        engine.score(prompt, ITEMS[0], len(prompt.token_ids))


def test_untied_model_then_a_failed_load_breaks_the_engine(tmp_path: Path) -> None:
    """One more engine: its own output layer is updated, and a wrong name leaves the engine broken, not half-new."""
    untied = [small_model(small_config(1, tie=False), small_tokenizer(), seed) for seed in (0, 1)]
    prompt = study_prompt(0, tokens_per_modality=1)
    with start(tmp_path, untied[0]) as engine:
        for version, model in ((0, untied[0]), (1, untied[1])):
            if version:
                engine.update_weights(weights(model, version))
            group = engine.submit(prompt, ITEMS[0], 0, 4, 0, SAMPLING).result()
            assert difference(model, group, ITEMS[0]) < TOLERANCE
        with pytest.raises(EngineBrokenError, match="half-way"):
            engine.update_weights(pack_weights(2, [("study_tower.no_such_layer.weight", torch.zeros(1))]))
        with pytest.raises(EngineBrokenError, match="new engine"):
            engine.submit(prompt, ITEMS[0], 0, 4, 0, SAMPLING)
        with pytest.raises(EngineBrokenError):
            engine.update_weights(weights(untied[0], 3))


def test_plain_text_model(tmp_path: Path) -> None:
    """The same engine without items, a tied Llama of `transformers`; the folder of version 1 is loaded into it."""
    tokenizer = small_tokenizer()
    settings = {"initializer_range": 0.2, "tie_word_embeddings": True, "eos_token_id": 2}
    for version in (0, 1):
        tiny_llama(len(tokenizer), 64, seed=version, **settings).save_pretrained(tmp_path / str(version))
    tokenizer.save_pretrained(tmp_path / "0")
    prepare_environment(1, cpu=True)
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 8, 9, 10], np.int32), item_id=None, ground_truth="")
    with VllmEngine(tmp_path / "0", ENGINE) as engine:
        for version in (0, 1):
            policy = load_policy(tmp_path / str(version))
            if version:
                engine.update_weights(pack_weights(version, named_weights(policy)))
            group = engine.submit(prompt, None, 0, 4, 0, SAMPLING).result()
            assert difference(policy, group, None) < TOLERANCE
