"""Checkpoints: complete or not there, damage is found, and settings that would corrupt a run are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medtvt_rl.config import Config, load_config
from pipelines import checkpoints

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def a_config(root: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"run.root={root}", *overrides])


def write(config: Config, version: int, keep: int = 9) -> Path:
    """A checkpoint whose learners' part is two small files."""
    learner = checkpoints.unfinished(config, version) / checkpoints.LEARNER
    (learner / "state").mkdir(parents=True)
    (learner / "state" / "weights.pt").write_bytes(bytes(range(256)) * version)
    (learner / "latest").write_text("state")
    checkpoints.complete(config, version, {"version": version}, keep)
    return config.checkpoint_folder(version)


def test_the_newest_comes_back_whole_and_older_ones_go(tmp_path: Path) -> None:
    config, said = a_config(tmp_path), list[str]()
    assert checkpoints.newest(config, said.append) is None
    for version in (5, 10, 15):
        write(config, version, keep=2)
    found = checkpoints.newest(config, said.append)
    assert found is not None and (found.version, found.loop) == (15, {"version": 15})
    assert (found.learner / "state" / "weights.pt").stat().st_size == 15 * 256
    names = sorted(path.name for path in found.folder.parent.iterdir())
    assert names == ["step_000010", "step_000015"] and not said


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest", "no manifest", "unfinished"])
def test_a_damaged_one_is_passed_over_with_a_line(tmp_path: Path, damage: str) -> None:
    config, said = a_config(tmp_path), list[str]()
    write(config, 5)
    folder = write(config, 10)
    weights, manifest = folder / "learner" / "state" / "weights.pt", folder / "manifest.json"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "lose":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        folder.rename(checkpoints.unfinished(config, 10))
    found = checkpoints.newest(config, said.append)
    assert found is not None and found.version == 5
    assert (len(said) == 0) if damage == "unfinished" else ("step_000010 is damaged and passed over" in said[0])


def test_settings_that_its_state_depends_on_are_refused_and_others_are_told(tmp_path: Path) -> None:
    folder = write(a_config(tmp_path), 5)
    found = checkpoints.read(folder)
    changed = checkpoints.check_settings(
        found, a_config(tmp_path, "grpo.learning_rate=1e-4", "grpo.max_staleness=0", "rollout.num_generators=3")
    )
    assert "grpo.learning_rate: 0.0002 then, 0.0001 now" in changed and len(changed) == 3
    for override in ("run.seed=7", "model.backbone.num_layers=6", "grpo.group_size=4", "data.film.size=128"):
        both = [override, "model.cxr.image_size=128"] if "film" in override else [override]
        key = override.split("=")[0]
        with pytest.raises(checkpoints.CheckpointError, match=rf"{key}: .* then.*resume=never"):
            checkpoints.check_settings(found, a_config(tmp_path, *both))


def test_the_manifest_names_the_packages(tmp_path: Path) -> None:
    manifest = json.loads((write(a_config(tmp_path), 5) / "manifest.json").read_text())
    assert {"torch", "deepspeed", "numpy"} <= set(manifest["packages"])
