"""What a run goes on from: flipped bits in checkpoints, model folders and weights are refused, or change nothing."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import CASES, assert_clear, spoiled, spoiled_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_examples import finished_group, prompt_of, write
from tiny_llama import tiny_llama

from medtvt_rl.learner.epoch_checkpoints import EpochCheckpoints
from medtvt_rl.learner.supervised import Progress
from medtvt_rl.learner.training_state import StateError, StateReader, TrainingState, rank_file
from medtvt_rl.model.kept_adapter import read_adapter, write_adapter
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.reference_checkpoint import read_published
from medtvt_rl.model.seal import check_model_folder, seal
from medtvt_rl.weights import LowRank, WeightBuffer, WeightBufferError, pack_weights
from pipelines.checkpoints import SCORE, CheckpointStore, folder_name

SHAPES = {"a": (2, 3), "b": (5,)}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two checkpoints, of which the newest has groups that wait, and a score."""
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    write(store, 2)
    write(store, 3, [finished_group(7)])
    store.mark(3, "jaccard", 0.5)
    return store


@CASES
@given(data=st.data())
def test_a_spoiled_checkpoint_is_passed_over(store: CheckpointStore, data: st.DataObject) -> None:
    newest = Path(store.place(3))
    store = CheckpointStore(str(newest.parent))  # one that has not met the checkpoint yet
    path = data.draw(st.sampled_from(sorted(path for path in newest.rglob("*") if path.is_file())))
    content, settings = path.read_bytes(), store.read(3).settings
    changed = data.draw(spoiled(content))
    path.write_bytes(changed)
    said: list[str] = []
    found, best = store.newest(said.append), store.best()
    path.write_bytes(content)
    assert found is not None and found.loop == {"version": found.version}
    assert best is None or path.name == SCORE or best == (3, 0.5)
    if found.version == 3:
        assert changed == content or path.name == SCORE or json.loads(changed) == json.loads(content)
        assert found.settings == settings and said == []
        assert [group.header.group_id for group in found.groups({7: prompt_of(7)}, lambda value: value)] == [7]
    else:
        assert found.version == 2 and len(said) == 1
        assert folder_name(3) in said[0] and "\n" not in said[0] and len(said[0]) < 2000


@pytest.fixture(scope="session")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> EpochCheckpoints:
    """The checkpoint of a supervised stage after two epochs, of which the first was the best."""
    root = tmp_path_factory.mktemp("stage")
    checkpoints = EpochCheckpoints(root / "checkpoint", root / "model")
    best = checkpoints.best(0)
    best.mkdir(parents=True)
    (best / "config.json").write_text("{}")
    save_file({"a": torch.ones(3)}, best / "model.safetensors")
    seal(best)
    folder = checkpoints.begin(2)
    for name in ("rank_00000.safetensors", "rest.safetensors"):
        (folder / name).write_bytes(b"state")
    facts = {"encoder_auc": {}, "settings": {"sft": {"epochs": 2}}, "packages": {}, "identity": {"model": "abc"}}
    checkpoints.complete(Progress(epochs=2, steps=9, best=-1.5, best_epoch=0), 1, facts)
    return checkpoints


@CASES
@given(data=st.data())
def test_a_spoiled_checkpoint_of_an_epoch_is_passed_over(epochs: EpochCheckpoints, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in epochs.folder.rglob("*") if path.is_file())))
    content = path.read_bytes()
    changed = data.draw(spoiled(content))
    whole, said = epochs.newest(said_nothing), list[str]()
    path.write_bytes(changed)
    found = epochs.newest(said.append)
    path.write_bytes(content)
    if found is None:
        assert (
            len(said) == 1 and "is damaged and passed over: " in said[0] and "\n" not in said[0] and len(said[0]) < 2000
        )
    else:
        assert found == whole and not said


def said_nothing(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of two ranks, as their files."""
    folder = tmp_path_factory.mktemp("state")
    words = [random.getstate(), np.random.get_state()]
    for rank in (0, 1):
        pieces = {"a": torch.arange(rank * 3.0, rank * 3 + 3), "b": torch.ones(2 + rank)}
        starts = {"a": 3 * rank, "b": 2 * rank}
        tensors = {f"weight|{starts[name]}|{name}": piece for name, piece in pieces.items()}
        tensors |= {f"exp_avg|{starts[name]}|{name}": -piece for name, piece in pieces.items()}
        tensors["random|torch"] = torch.get_rng_state()
        numpy_random = [part.tolist() if isinstance(part, np.ndarray) else part for part in words[1]]
        metadata = {
            "format": 1,
            "world_size": 2,
            "parameters": SHAPES,
            "moments": ["exp_avg"],
            "steps": 4,
            "python_random": words[0],
            "numpy_random": numpy_random,
        }
        TrainingState(tensors=tensors, metadata=metadata).write(rank_file(folder, rank))
    return folder


@CASES
@given(data=st.data(), in_header=st.booleans())
def test_spoiled_pieces_of_a_state(written: Path, tmp_path: Path, data: st.DataObject, in_header: bool) -> None:
    """What the manifest would find anyway: a reader of the pieces alone neither fails in its own way nor reads else."""
    folder = tmp_path / "learner"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written, folder)
    path = rank_file(folder, data.draw(st.integers(0, 1)))
    if in_header:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            text = file.metadata()["state"]
        save_file(tensors, path, metadata={"state": data.draw(spoiled_json(text)).decode("utf-8", "replace")})
    else:
        path.write_bytes(data.draw(spoiled(path.read_bytes())))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with StateReader(folder) as reader:
            reader.check_parameters(SHAPES)
            for kind in ("weight", *reader.moments):
                assert reader.read(kind, "a", 1, 4).shape == (4,) and reader.read(kind, "b", 0, 5).shape == (5,)
            for rank in (0, 1):
                reader.restore_random(rank)
    except StateError as error:
        assert_clear(error, str(folder))
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, sealed."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(32).save_pretrained(folder)
    pairs = {"model.layers.0.self_attn.q_proj.weight": (torch.ones(2, 4), torch.ones(4, 2))}
    write_adapter(folder, pairs, rank=2, base=folder)
    seal(folder)
    return folder


@CASES
@given(data=st.data())
def test_a_spoiled_model_folder_is_refused(model_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
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


@CASES
@given(data=st.data())
def test_a_spoiled_adapter_is_refused_or_read(model_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder / "adapter", folder / "adapter")
    path = data.draw(st.sampled_from(sorted((folder / "adapter").iterdir())))
    content = path.read_bytes()
    ways = st.one_of(spoiled(content), spoiled_json(content.decode())) if path.suffix == ".json" else spoiled(content)
    path.write_bytes(data.draw(ways))
    try:
        read_adapter(folder)
    except ValueError as error:
        assert_clear(error, "adapter: not a whole peft adapter")


@CASES
@given(data=st.data(), with_zip=st.booleans())
def test_a_spoiled_published_checkpoint_is_refused_or_read(tmp_path: Path, data: st.DataObject, with_zip: bool) -> None:
    path = tmp_path / "published.pth"
    tensors = {"llama.norm.weight": torch.ones(64), "module.a": torch.arange(6.0).reshape(2, 3).T}
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=with_zip)
    path.write_bytes(data.draw(spoiled(path.read_bytes())))
    try:
        read_published(path)
    except ValueError as error:
        assert_clear(error, str(path))


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
