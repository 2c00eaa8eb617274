"""This model against numbers read off the published implementation, by a checkpoint in the published layout.

golden/reference_model.json names and shapes every entry; each weight is drawn from its name. The arrays in
golden/reference_model.npz are the published implementation's outputs, float32 on a CPU, with two studies.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.reference_checkpoint import convert_published, read_published

GOLDEN = Path(__file__).parent / "golden"
DESCRIPTION: dict[str, Any] = json.loads((GOLDEN / "reference_model.json").read_text())
TOLERANCE = 2e-4


def generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[DESCRIPTION["seed"], key]))


def weight(name: str, shape: list[int], dtype: str) -> Tensor:
    if dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    draw = generator(zlib.crc32(name.replace(".convpath.0.", ".convs.").encode()))
    x = np.asarray(draw.standard_normal(shape or None, dtype=np.float32), dtype=np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif last == "running_mean" or x.ndim < 2:
        x = 0.1 * x if last != "weight" else 1 + 0.1 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: weight(name, *kind) for name, kind in DESCRIPTION["state_dict"].items()}


@pytest.fixture(scope="module")
def model(state: dict[str, Tensor]) -> MedTVTForCausalLM:
    torch.set_num_threads(1)
    return convert_published(state, DESCRIPTION["llama_params"], list(DESCRIPTION["special_tokens"].values()))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "reference_model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    size = DESCRIPTION["batch"]
    return (
        torch.from_numpy(generator(1).standard_normal((size, 12, 1000), dtype=np.float32)),
        torch.from_numpy(generator(2).standard_normal((size, 3, 224, 224), dtype=np.float32)),
        torch.from_numpy(generator(3).random((size, 100), dtype=np.float32)),
    )


def agree(found: Tensor, golden: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), golden, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_tower_equals_the_published_one(
    model: MedTVTForCausalLM, golden: dict[str, np.ndarray], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    tower = model.study_tower
    agree(tower.ecg_encoder.sequence(inputs[0]).mean(dim=1), golden["ecg_encoder_mean"])
    present = torch.ones(DESCRIPTION["batch"], 3, dtype=torch.bool)
    features = [encoder(values) for encoder, values in zip(tower.encoders, inputs)]
    projected = tower.perception.project(features, present)
    fused = tower.perception.fuse(projected)
    tokens, gates = model.perceive(*inputs)
    for m, name in enumerate(("ecg", "cxr", "lab")):
        agree(projected[m], golden[f"{name}_token"])
        agree(fused[m], golden[f"fused_{name}"])
        agree(tokens[:, m : m + 1], golden[f"weighted_{name}"])
    agree(gates[:, [1, 0, 2]][:, None], golden["gates_cxr_ecg_lab"])


@torch.no_grad()
def test_logits_and_loss_equal_the_published_ones(
    model: MedTVTForCausalLM, golden: dict[str, np.ndarray], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    tokens, labels = (torch.from_numpy(golden[name]).long() for name in ("tokens", "labels"))
    ecg, cxr, lab = inputs
    logits = model(input_ids=tokens, ecg=ecg, cxr=cxr, lab=lab).logits[:, :-1]
    agree(logits, golden["logits"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
    agree(loss, golden["loss"])


def test_both_published_files_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    some = {name: tensor for name, tensor in state.items() if name.startswith("lab_")}
    torch.save(some, tmp_path / "rl.pth")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in some.items()}}, tmp_path / "sft.pth")
    for file in ("rl.pth", "sft.pth"):
        read = read_published(tmp_path / file)
        assert read.keys() == some.keys() and all(torch.equal(read[name], some[name]) for name in some)


def test_incomplete_checkpoint_is_refused(state: dict[str, Tensor]) -> None:
    tokens = list(DESCRIPTION["special_tokens"].values())
    less = {name: tensor for name, tensor in state.items() if name != "DynamicWeighting.gate.bias"}
    with pytest.raises(ValueError, match=r"perception\.gate\.bias"):
        convert_published(less, DESCRIPTION["llama_params"], tokens)
    more = state | {"sonar.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"sonar\.weight"):
        convert_published(more, DESCRIPTION["llama_params"], tokens)
