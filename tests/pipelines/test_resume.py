"""Whether a run may go on: what must be the same is compared, what may differ is told."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stored_examples import a_config, prompt_of, store_at, write

from medtvt_rl.config import Config
from medtvt_rl.model.seal import seal
from medtvt_rl.storage import Storage
from pipelines.checkpoints import CheckpointStore
from pipelines.identity import identity_of
from pipelines.resume import ResumeError, check_same, find_resume


def found(tmp_path: Path, *overrides: str, identity: str = "abc") -> list[str]:
    """What is told of going on with these settings."""
    store = store_at(tmp_path)
    write(store, 5, config=a_config(tmp_path))
    return check_same(store.read(5), a_config(tmp_path, *overrides), {"model": identity})


def test_what_may_differ_is_told(tmp_path: Path) -> None:
    ranks = ["learner.num_workers=2", "learner.zero_stage=3", "rollout.num_generators=3", "data.num_workers=7"]
    changed = found(tmp_path, "grpo.learning_rate=1e-4", "grpo.max_staleness=0", "grpo.steps=50", *ranks)
    assert "grpo.learning_rate: 0.0002 then, 0.0001 now" in changed and len(changed) == 7


@pytest.mark.parametrize(
    "override", ["run.seed=7", "model.backbone.num_layers=6", "grpo.group_size=4", "data.film.size=128"]
)
def test_settings_that_the_state_depends_on_are_refused(tmp_path: Path, override: str) -> None:
    both = [override, "model.cxr.image_size=128"] if "film" in override else [override]
    with pytest.raises(ResumeError, match=rf"{override.split('=')[0]}: .* then.*resume=never"):
        found(tmp_path, *both)


def test_another_model_at_the_same_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"the model or tokenizer that the run started from changed since then"):
        found(tmp_path, identity="abd")


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"has 5 steps, and grpo.steps is 3; set at least 5"):
        found(tmp_path, "grpo.steps=3")


def test_where_a_stage_goes_on(tmp_path: Path) -> None:
    store, said, identity = store_at(tmp_path), list[str](), {"model": "abc"}
    config = a_config(tmp_path)
    assert find_resume(config, store, identity, said.append) is None and not said
    write(store, 5, config=config)
    found = find_resume(config, store, identity, said.append)
    assert found is not None and found.version == 5 and said[-1] == f"goes on from step 5 ({found.place})"
    assert find_resume(a_config(tmp_path, "resume=never"), store, identity, said.append) is None
    store.finish()
    assert find_resume(config, store, identity, said.append) is None
    assert said[-1].startswith("starts anew: the checkpoints in ") and said[-1].endswith("are of a finished stage")


def test_checkpoints_that_cannot_be_read_are_not_thrown_away(tmp_path: Path) -> None:
    store, said, identity, config = store_at(tmp_path), list[str](), {"model": "abc"}, a_config(tmp_path)
    for version in (3, 5):
        write(store, version, config=config)
        (Path(store.place(version)) / "loop.json").unlink()
    with pytest.raises(ResumeError, match=r"no checkpoint in \S+ can be read, 2 lie there.*resume=never") as refused:
        find_resume(config, store, identity, said.append)
    assert [line.rsplit(": ", 1)[1] for line in said] == ["loop.json is missing"] * 2 and "\n" not in str(refused.value)
    assert find_resume(a_config(tmp_path, "resume=never"), store_at(tmp_path), identity, said.append) is None


class SlowDown(Exception):
    """What a store's client raises, of no kind that anyone else knows."""


@pytest.mark.parametrize("call", ["is_file", "ls", "newest alone"])
@pytest.mark.parametrize("fault", [SlowDown("503"), ConnectionError("503"), TimeoutError("503")])
def test_a_store_out_of_reach_ends_the_start_and_no_older_checkpoint_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: Exception
) -> None:
    config = a_config(tmp_path)
    config.grpo.checkpoint_root = f"memory://bucket/{uuid.uuid4()}"
    store, said, read = CheckpointStore.of(config), list[str](), Storage.read
    for version in (3, 5):
        write(store, version, config=config)

    def fails(storage: Storage, name: str = "step_000005") -> bytes:
        if call != "newest alone" or name.startswith("step_000005"):
            raise fault
        return read(storage, name)

    monkeypatch.setattr(Storage, {"is_file": "exists", "ls": "names", "newest alone": "read"}[call], fails)
    words = rf"the checkpoints in memory://\S+ cannot be read \({type(fault).__name__}: 503\); nothing was started, try"
    with pytest.raises(ResumeError, match=words):
        find_resume(config, store, {"model": "abc"}, said.append)
    assert not said and not store.damaged


def test_identity_is_of_content_and_not_of_places(tmp_path: Path) -> None:
    config, prompts = Config(), [prompt_of(1), prompt_of(2)]
    config.task.items = None
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "tokenizer.json").write_text("{}")
        # The one was made by another release of the library than the other.
        (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": folder.name}))
        seal(folder)
    before = identity_of(config, folders[0], prompts)
    assert identity_of(config, folders[1], prompts) == before and set(before) == {"model", "prompts"}
    (folders[1] / "adapter").mkdir()
    (folders[1] / "adapter" / "adapter_model.safetensors").write_bytes(b"pairs")
    assert identity_of(config, folders[1], prompts)["model"] != before["model"]
    shutil.rmtree(folders[1] / "adapter")
    (folders[1] / "tokenizer.json").write_text("{ }")
    assert identity_of(config, folders[1], prompts)["model"] != before["model"]
    other = [replace(prompts[0], token_ids=np.array([1, 2], dtype=np.int32)), prompts[1]]
    (folders[0] / "config.json").write_text(json.dumps({"hidden_size": 9, "transformers_version": "a"}))
    assert identity_of(config, folders[0], prompts)["model"] != before["model"]
    for changed in (prompts[::-1], prompts[:1], other):
        assert identity_of(config, folders[0], changed)["prompts"] != before["prompts"]
