"""Checkpoints: complete or not there, damage is found, the newest and the best are kept, and groups come back whole."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_examples import a_config, finished_group, prompt_of, store_at, write

from medtvt_rl.config_checks import ConfigError
from medtvt_rl.storage import Storage
from pipelines.checkpoints import Checkpoint, CheckpointStore
from pipelines.group_ledger import GroupLedger


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints lie: a folder, and an object store."""
    return str(tmp_path / "checkpoints") if request.param == "folder" else f"memory://bucket/{uuid.uuid4()}"


def test_the_newest_comes_back_whole_and_older_ones_go(root: str) -> None:
    store, said = CheckpointStore(root), list[str]()
    assert store.newest(said.append) is None and store.versions() == []
    for version in (5, 10, 15):
        write(store, version)
    Storage(store.begin(12)).write("learner/rank_00000.safetensors", b"half")
    store.rotate(keep=2)
    assert Storage(root).names() == ["step_000010", "step_000015"], "nor is there what was cut short"
    found = store.newest(said.append)
    assert found is not None and (found.version, found.loop) == (15, {"version": 15})
    assert len(Storage(found.learner).read("rank_00000.safetensors")) == 15 * 256
    assert store.versions() == [15, 10] and not said
    assert {"torch", "deepspeed", "numpy"} <= set(found.packages) and found.identity == {"model": "abc"}
    assert store.clear() == 2 and store.versions() == []


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest", "no manifest", "unfinished"])
def test_a_damaged_one_is_passed_over_with_a_line(root: str, damage: str) -> None:
    store, said = CheckpointStore(root), list[str]()
    write(store, 5)
    if damage == "unfinished":
        Storage(store.begin(10)).write("learner/rank_00000.safetensors", b"half")
    else:
        write(store, 10)
        folder = Storage(store.place(10))
        name = "manifest.json" if "manifest" in damage else "learner/rank_00000.safetensors"
        content = folder.read(name)
        if damage == "flip":
            folder.write(name, content[:100] + bytes([content[100] ^ 1]) + content[101:])
        elif damage in ("cut", "manifest"):
            folder.write(name, content[: len(content) // 2])
        else:
            folder.remove(name)
    found = store.newest(said.append)
    assert found is not None and found.version == 5
    # Behind a URL one without a manifest is not complete; in a folder it is damaged, since it appears as a whole.
    silent = damage == "unfinished" or (damage == "no manifest" and root.startswith("memory"))
    assert (len(said) == 0) if silent else ("step_000010 is damaged and passed over" in said[0])
    write(store, 10)
    assert store.newest(said.append).version == 10  # type: ignore[union-attr]


def test_one_that_makes_room_while_it_is_read_is_no_damage(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As restarted learners may find it: a checkpoint of just before their end appears meanwhile."""
    store, said, read = CheckpointStore(root), list[str](), CheckpointStore.read
    write(store, 15)

    def overtaken(store: CheckpointStore, version: int) -> Checkpoint:
        if version == 15:
            write(store, 20)
            store.rotate(keep=1)
        return read(store, version)

    monkeypatch.setattr(CheckpointStore, "read", overtaken)
    found = store.newest(said.append, last=20)
    assert found is not None and found.version == 20 and not said and not store.damaged
    assert store.newest(said.append, last=19) is None


def test_a_damaged_one_takes_no_whole_one_s_place(root: str) -> None:
    store = CheckpointStore(root)
    for version in (2, 9):
        write(store, version)
    Storage(store.place(9)).write("learner/rank_00000.safetensors", b"damaged")
    found = store.newest(lambda told: None)
    assert found is not None and found.version == 2
    write(store, 4)
    store.rotate(keep=1)
    assert store.versions() == [4] and store.has(9), "what is damaged stays for who wants to look"
    assert CheckpointStore(root).newest(lambda told: None).version == 4  # type: ignore[union-attr]
    write(store, 9)
    store.rotate(keep=1)
    assert store.versions() == [9]


def test_a_damaged_one_that_is_not_written_anew_to_the_end_takes_no_whole_one_s_place_either(root: str) -> None:
    store = CheckpointStore(root)
    for version in (2, 9):
        write(store, version)
    Storage(store.place(9)).write("learner/rank_00000.safetensors", b"damaged")
    assert store.newest(lambda told: None).version == 2  # type: ignore[union-attr]
    Storage(store.begin(9)).write("learner/rank_00000.safetensors", b"half")
    store.rotate(keep=1)
    assert store.versions() == [2] and CheckpointStore(root).newest(lambda told: None).version == 2  # type: ignore[union-attr]
    behind_url = root.startswith("memory")
    assert Storage(root).names() == (["step_000002"] if behind_url else ["step_000002", "step_000009"])


def test_the_best_on_held_out_answers_is_never_rotated_away(root: str) -> None:
    store = CheckpointStore(root)
    for version, score in ((5, 0.4), (10, 0.6), (15, 0.5), (20, None), (25, None)):
        write(store, version)
        if score is not None:
            store.mark(version, "jaccard", score)
    assert store.best() == (10, 0.6)
    store.rotate(keep=1, also=[20])
    assert store.versions() == [25, 20, 10] and store.best() == (10, 0.6)
    store.mark(25, "jaccard", 0.6)
    assert store.best() == (25, 0.6), "the later of two equals"


def test_what_a_finished_stage_left_is_still_there_for_a_replay(root: str) -> None:
    store = CheckpointStore(root)
    write(store, 5)
    assert not store.is_finished
    store.finish()
    assert store.is_finished and store.versions() == [5] and store.read(5).version == 5
    store.clear()
    assert not store.is_finished


@pytest.mark.parametrize("with_reference", [True, False])
def test_groups_that_wait_come_back_as_they_were(root: str, with_reference: bool) -> None:
    store = CheckpointStore(root)
    groups = [finished_group(group_id, with_reference) for group_id in (3, 7, 8)]
    gone = replace(groups[1], payload=KeyError("its node died"))
    write(store, 5, [groups[0], gone, groups[2]])
    prompts = {group_id: prompt_of(group_id) for group_id in (3, 7, 8)}
    found = store.read(5).groups(prompts, lambda value: value)
    assert [group.header.group_id for group in found] == [3, 8], "what cannot be fetched is made again"
    for before, after in zip((groups[0], groups[2]), found):
        assert after.header == before.header
        assert _plain(after) == _plain(before)
    with pytest.raises(ValueError, match=r"group 3: its prompt was study-\w{12}, and is study-\w{12} now"):
        store.read(5).groups({**prompts, 3: prompt_of(7)}, lambda value: value)


def _plain(group: Any) -> Any:
    """All that a group holds, comparable."""

    def of(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return (str(value.dtype), value.tolist())
        if isinstance(value, (tuple, list)):
            return [of(each) for each in value]
        if isinstance(value, dict):
            return {key: of(each) for key, each in value.items()}
        if hasattr(value, "__dataclass_fields__"):
            return {name: of(getattr(value, name)) for name in value.__dataclass_fields__}
        return value

    return of(group)


def test_a_checkpoint_appears_at_the_end_and_not_before(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    place = Path(store.begin(5))
    assert place.name == ".step_000005.writing" and store.versions() == []
    write(store, 5)
    assert not place.exists() and store.versions() == [5]


@pytest.mark.parametrize("url", ["nonsense://bucket/runs", "memory://runs"])
def test_a_root_that_cannot_be_reached_is_refused_before_anything_starts(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"grpo.checkpoint_root is '\w+://.*'.*set a folder"):
        a_config(tmp_path, f"grpo.checkpoint_root={url}")
    config = a_config(tmp_path, "grpo.checkpoint_root=file:///shared/", "run.name=one")
    assert config.checkpoint_root == "file:///shared/one"


def test_what_became_of_a_group_is_settled_or_not() -> None:
    known = GroupLedger.known({"buffer": {"pending": [2, 5], "next_group_id": 7}})
    assert [group for group in range(9) if known(group)] == [0, 1, 3, 4, 6]


def test_a_score_that_cannot_be_read_makes_none_the_best(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    write(store, 5)
    store.mark(5, "jaccard", 0.5)
    Path(store.place(5), "held_out.json").write_text(json.dumps({"version": 5}))
    assert store.best() is None


def test_a_store_that_cannot_be_asked_for_a_file_does_not_deny_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(root)
    storage.write("there", b"")
    assert storage.exists("there") and not storage.exists("elsewhere") and not storage.exists("there/below")

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError("403")

    monkeypatch.setattr(type(storage._fs), "info", refused)
    with pytest.raises(PermissionError, match="403"):
        storage.exists("there")
