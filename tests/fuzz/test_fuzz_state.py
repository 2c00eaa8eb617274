"""What a run goes on from: flipped bits in checkpoints, model folders and weights are refused, or change nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import CASES, assert_clear, spoiled
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import tiny_llama

from medtvt_rl.config import Config
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.seal import check_model_folder, seal
from medtvt_rl.weights import LowRank, WeightBuffer, WeightBufferError, pack_weights
from pipelines import checkpoints

LOOP = {"buffer": {"version": 3, "pending": [1, 2]}, "sampler": {"position": 7}}


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """The configuration of a run with two checkpoints."""
    config = Config()
    config.run.root = str(tmp_path)
    for version in (2, 3):
        folder = checkpoints.unfinished(config, version) / checkpoints.LEARNER
        folder.mkdir(parents=True)
        (folder / "weights.pt").write_bytes(bytes(range(256)) * 4)
        (folder / "empty").touch()
        checkpoints.complete(config, version, LOOP, keep=2)
    return config


@CASES
@given(data=st.data())
def test_a_spoiled_checkpoint_is_passed_over(run: Config, data: st.DataObject) -> None:
    newest = run.checkpoint_folder(3)
    path = data.draw(st.sampled_from(sorted(path for path in newest.rglob("*") if path.is_file())))
    content = path.read_bytes()
    changed = data.draw(spoiled(content))
    path.write_bytes(changed)
    said: list[str] = []
    found = checkpoints.newest(run, said.append)
    path.write_bytes(content)
    assert found is not None and found.loop == LOOP
    if found.version == 3:
        assert changed == content or path.name == checkpoints.MANIFEST
        assert found.settings == checkpoints.read(newest).settings and said == []
    else:
        assert found.version == 2 and len(said) == 1 and str(newest) in said[0] and "\n" not in said[0]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, sealed."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(32).save_pretrained(folder)
    seal(folder)
    return folder


@CASES
@given(data=st.data())
def test_a_spoiled_model_folder_is_refused(model_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    path.write_bytes(data.draw(spoiled(content)))
    try:
        check_model_folder(folder)
    except ValueError as error:
        assert_clear(error, str(folder))
    else:
        assert path.read_bytes() == content or path.name == "checksums.json"
        same = load_policy(folder).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in load_policy(model_folder).state_dict().items())


def test_only_safetensors_are_read(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        load_policy(folder)


def buffer() -> WeightBuffer:
    low_rank = LowRank(down=torch.ones(2, 4), up=torch.ones(3, 2), scale=0.5, dtype=torch.float32)
    named = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": low_rank}
    return pack_weights(1, named.items())


@CASES
@given(data=st.data())
def test_spoiled_weights_are_refused(data: st.DataObject) -> None:
    sent = buffer()
    arrived = np.frombuffer(data.draw(spoiled(sent.data.tobytes())), dtype=np.uint8)
    if arrived.tobytes() == sent.data.tobytes():
        return
    with pytest.raises(WeightBufferError, match="checksum"):
        replace(sent, data=arrived).verify()


@CASES
@given(
    field=st.sampled_from(["dtype", "shape", "offset_bytes", "num_bytes"]),
    text=st.sampled_from(["load", "float64", "nothing", "__name__", "", "int8"]),
    number=st.integers(-(2**40), 2**40),
    shape=st.lists(st.integers(-4, 2**40), max_size=3).map(tuple),
)
def test_a_spoiled_index_reads_nothing_else(field: str, text: str, number: int, shape: tuple[int, ...]) -> None:
    sent = buffer()
    value = {"dtype": text, "shape": shape}.get(field, number)
    wrong = replace(sent, index=(replace(sent.index[0], **{field: value}), *sent.index[1:]))
    try:
        found = dict(wrong.tensors())["a"]
    except WeightBufferError as error:
        assert_clear(error, "transfer again")
    else:
        assert found.numel() * found.element_size() <= sent.data.nbytes
