"""The files of a learner's state: pieces come together by name and element, and what is missing or foreign is named."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medtvt_rl.learner.fragments import Fragment, held_fragments
from medtvt_rl.learner.training_state import StateReader, TrainingState, rank_file

SHAPES = {"weight": (3, 4), "bias": (4,)}


def a_module(seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """After two steps."""
    torch.manual_seed(seed)
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    train(module, optimizer)
    return module, optimizer


def train(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    """Two steps."""
    for _ in range(2):
        optimizer.zero_grad()
        (module.weight.square().sum() + module.bias.sin().sum()).backward()
        optimizer.step()


def write_as(folder: Path, num_ranks: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """The module, as if each of some ranks held an uneven part of every parameter."""
    module, optimizer = a_module()
    whole = held_fragments(optimizer, module, 0, 0)
    for rank in range(num_ranks):
        parts = []
        for piece in whole:
            first, last = (piece.numel * place**2 // num_ranks**2 for place in (rank, rank + 1))
            own = {name: getattr(piece, name) for name in ("name", "shape", "held", "optimizer")}
            if first < last:
                parts.append(Fragment(**own, start=first, numel=last - first, offset=first))
        TrainingState.of(parts, SHAPES, num_ranks, copy=True).write(rank_file(folder, rank))
    return module, optimizer


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_number_of_ranks_writes_what_any_other_reads(tmp_path: Path, num_ranks: int) -> None:
    module, optimizer = write_as(tmp_path, num_ranks)
    torch.manual_seed(5)
    fresh = nn.Linear(3, 4)
    fresh.weight = nn.Parameter(torch.zeros(3, 4))
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    with StateReader(tmp_path) as reader:
        reader.check_parameters(SHAPES)
        for fragment in held_fragments(other, fresh, 0, 0):
            fragment.restore(reader.read, reader.moments, reader.steps)
    train(module, optimizer)
    train(fresh, other)
    assert torch.equal(module.weight, fresh.weight) and torch.equal(module.bias, fresh.bias)


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    fragments = held_fragments(optimizer, module, 0, 0)
    TrainingState.of(fragments, {"weight": (2, 2), "bias": (2,)}, 1, copy=False).write(rank_file(tmp_path, 0))
    with StateReader(tmp_path) as reader:
        assert (reader.steps, reader.moments) == (0, ())
        fragments[0].restore(reader.read, reader.moments, reader.steps)
    assert not optimizer.state


def test_a_copy_stays_as_it_was_while_training_goes_on(tmp_path: Path) -> None:
    module, optimizer = a_module()
    fragments = held_fragments(optimizer, module, 0, 0)
    copy, live = (TrainingState.of(fragments, SHAPES, 1, copy=each) for each in (True, False))
    before = module.weight.detach().clone()
    train(module, optimizer)
    assert torch.equal(copy.tensors["weight|0|weight"].view(3, 4), before)
    assert torch.equal(live.tensors["weight|0|weight"].view(3, 4), module.weight)
    assert copy.num_bytes == sum(tensor.nbytes for tensor in copy.tensors.values()) > 3 * 16 * 4


def test_random_states_come_back_by_rank_and_a_new_rank_keeps_its_own(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    np.random.standard_normal()
    random.gauss(0, 1)
    write_as(tmp_path, 2)
    expected = draw(), np.random.standard_normal(), random.gauss(0, 1)
    with StateReader(tmp_path) as reader:
        for rank in (0, 1):
            draw()
            reader.restore_random(rank)
            assert (draw(), np.random.standard_normal(), random.gauss(0, 1)) == expected
        reader.restore_random(2)
    assert draw() != expected[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("rank", "1 of the files of 2 ranks are there"),
        ("piece", "exp_avg of weight has .* of the elements 0 to 12"),
        ("cut", "rank_00001.safetensors: .*it is damaged"),
        ("foreign", "rank_00001.safetensors: .*it is damaged"),
        ("model", r"lacks \['scale'\], holds unknown \['bias'\], and of another shape \['weight'\]"),
    ],
)
def test_what_is_missing_or_foreign_is_named(tmp_path: Path, damage: str, words: str) -> None:
    write_as(tmp_path, 2)
    last = rank_file(tmp_path, 1)
    if damage == "rank":
        last.unlink()
    elif damage == "piece":
        from safetensors import safe_open

        with safe_open(last, framework="pt") as file:
            metadata = file.metadata()
        kept = {key: value for key, value in load_file(last).items() if not key.startswith("exp_avg|")}
        save_file(kept, last, metadata=metadata)
    elif damage == "cut":
        last.write_bytes(last.read_bytes()[:-9])
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, last)
    with pytest.raises(ValueError, match=words), StateReader(tmp_path) as reader:
        reader.check_parameters({"weight": (4, 3), "scale": (1,)} if damage == "model" else SHAPES)
        reader.read("exp_avg", "weight", 0, 12)
