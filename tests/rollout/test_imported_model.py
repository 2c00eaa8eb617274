"""A published checkpoint, imported, in a real engine: its log-probs are those of the model class."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from golden_model import TOKENS, golden_inputs, golden_state, write_files

from medtvt_rl.data.tokenizer import train_tokenizer
from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.reference_folder import import_reference
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.vllm_core import prepare_environment
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Prompt, RolloutGroup

pytestmark = pytest.mark.engine
TOLERANCE = 1e-4
STOPS = {"<|end_of_text|>": 310, "<|eot_id|>": 311}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint with its low-rank pairs merged, and kept as an adapter."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("imported")
    files = write_files(root, golden_state())
    train_tokenizer(["What is it?"], 300).save_pretrained(root / "tokenizer")
    for name in ("merged", "kept"):
        import_reference(
            files["checkpoint"],
            files["params"],
            files["vit_config"],
            root / name,
            special_tokens=TOKENS | STOPS,
            tokenizer=root / "tokenizer",
            keep_adapter=name == "kept",
        )
    return {name: root / name for name in ("merged", "kept")}


@pytest.fixture(params=["merged", "kept"])
def engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[VllmEngine]:
    prepare_environment(1, cpu=True)
    with VllmEngine(folders[request.param], EngineConfig(max_model_len=128, kv_cache_bytes=1 << 26)) as started:
        yield started


@torch.no_grad()
def test_log_probs_are_those_of_the_model_class(engine: VllmEngine, folders: dict[str, Path]) -> None:
    model = MedTVTForCausalLM.from_pretrained(folders["merged"]).eval()
    study = {name: values[:1] for name, values in golden_inputs().items()}
    item = {name: values[0].numpy() for name, values in study.items()} | {"present": np.ones(3, dtype=bool)}
    ecg, film, labs = TOKENS.values()
    # The second names the modalities where a sentence would, in another order.
    for number, ids in enumerate(([1, ecg, film, labs, 40, 50, 60], [1, 40, labs, 50, ecg, 60, film])):
        ids = np.array(ids, dtype=np.int32)
        prompt = Prompt(prompt_id=f"p{number}", token_ids=ids, item_id="s", ground_truth="")
        group = engine.submit(prompt, item, number, 2, 0, SamplingConfig(max_new_tokens=24)).result()
        check(model, study, ids, group)


def check(model: MedTVTForCausalLM, study: dict[str, torch.Tensor], ids: np.ndarray, group: RolloutGroup) -> None:
    for completion in group.completions:
        whole = torch.from_numpy(np.concatenate([ids, completion.token_ids])).long()[None]
        logits = model(whole, **study).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, whole[0, len(ids) :, None])[:, 0]
        np.testing.assert_allclose(completion.behaviour_logprobs, expected.numpy(), atol=TOLERANCE, rtol=0)


def test_an_answer_ends_at_either_of_the_published_end_tokens(engine: VllmEngine) -> None:
    item = {name: values[0].numpy() for name, values in golden_inputs().items()} | {"present": np.ones(3, dtype=bool)}
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, *TOKENS.values()]), item_id="s", ground_truth="")
    group = engine.submit(prompt, item, 9, 48, 0, SamplingConfig(max_new_tokens=100)).result()
    last = set()
    for completion in group.completions:
        ends = [place for place, token in enumerate(completion.token_ids) if token in STOPS.values()]
        assert ends in ([], [len(completion.token_ids) - 1])
        last |= {int(completion.token_ids[place]) for place in ends}
    assert last == set(STOPS.values())
