"""Checkpoints and finished groups for the tests of this suite."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medtvt_rl.config import Config, load_config
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.storage import Storage
from medtvt_rl.types import Completion, GroupHeader, Prompt, ReferenceHeader, RolloutGroup
from pipelines.checkpoints import LEARNER, CheckpointStore
from pipelines.grpo_roles import FinishedGroup

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
IDENTITY = {"model": "abc"}


def watch_syncs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Name -> bytes of what was in each file when it was last synced; its content survives a power cut up to there."""
    synced, fsync = dict[str, int](), os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.name] = path.stat().st_size

    monkeypatch.setattr(os, "fsync", watched)
    return synced


def a_config(root: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"run.root={root}", *overrides])


def store_at(root: Path) -> CheckpointStore:
    return CheckpointStore.of(a_config(root))


def fetch(payload: Any) -> Any:
    """What is behind a handle is the handle; an error is raised."""
    if isinstance(payload, Exception):
        raise payload
    return payload


def write(
    store: CheckpointStore, version: int, groups: Sequence[FinishedGroup] = (), config: Config | None = None
) -> None:
    """A checkpoint whose learners' part is one small file."""
    learner, name = Storage(f"{store.begin(version)}/{LEARNER}"), "rank_00000.safetensors"
    learner.write(name, bytes(range(256)) * version)
    files = {name: learner.digest(name)}
    config = config or load_config(QUICKSTART)
    store.complete(config, version, {"version": version}, groups, files, IDENTITY, fetch)


def prompt_of(group_id: int) -> Prompt:
    tokens = np.arange(1, 4 + group_id, dtype=np.int32)
    return Prompt(prompt_id=f"p{group_id}", token_ids=tokens, item_id=f"i{group_id}", ground_truth="A; B")


def finished_group(group_id: int, with_reference: bool = True, lengths: Sequence[int] = (3, 0, 5)) -> FinishedGroup:
    """One of three completions, of which one is empty and one could not be scored."""
    rng = np.random.default_rng(group_id)
    completions = tuple(
        Completion(
            completion_id=f"{group_id}/{index}",
            token_ids=rng.integers(0, 90, length).astype(np.int32),
            behaviour_logprobs=rng.standard_normal(length).astype(np.float32),
            policy_versions=np.sort(rng.integers(1, 4, length)).astype(np.int32),
            finish_reason="length" if length == 5 else "stop",
        )
        for index, length in enumerate(lengths)
    )
    group = RolloutGroup(group_id=group_id, prompt=prompt_of(group_id), completions=completions)
    rewards = GroupRewards(
        components={"jaccard": rng.random(3).astype(np.float32), "a/b": np.zeros(3, dtype=np.float32)},
        total=rng.random(3).astype(np.float32),
        failed=np.array([False, True, False]),
        reasons=(None, "a/b: boom", None),
        seconds=0.5,
    )
    reference = tuple(rng.standard_normal(length).astype(np.float32) for length in lengths)
    kl = ReferenceHeader(kl=rng.random(3).astype(np.float32), seconds=0.25)
    return FinishedGroup(
        header=GroupHeader.of(group, 1.5),
        payload=group,
        rewards=rewards,
        reference=reference if with_reference else None,
        reference_header=kl if with_reference else None,
    )
