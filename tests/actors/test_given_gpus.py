"""An actor that was given a GPU which its process does not find says so; no Ray is started."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors import learner_worker, reference_policy
from actors.bundles import Bundle
from actors.learner_worker import LearnerWorker
from actors.placement import Placement
from actors.reference_policy import ReferencePolicy
from medtvt_rl.config import Config
from medtvt_rl.learner.process_group import check_gpu


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    """Every role has a GPU, on a node where PyTorch finds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config()
    for role in ("rollout", "learner", "reference"):
        getattr(config.placement, role).gpus = 0.5
    return config


def said(role: str) -> str:
    return rf"placement\.{role}\.gpus is 0\.5, and PyTorch .* on .* finds no GPU; .*nvidia-smi.*make setup EXTRA=cuda"


def test_a_learner_without_its_gpu_does_not_join(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_worker, "redirect_output", lambda path: path)
    kind: Any = LearnerWorker
    rank = kind.__ray_metadata__.modified_class(0, 1, config)
    with pytest.raises(ValueError, match=said("learner")):
        rank.setup("no such folder", "127.0.0.1", 0)


def test_a_reference_without_its_gpu_does_not_load(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_policy, "redirect_output", lambda path: path)
    kind: Any = ReferencePolicy
    with pytest.raises(ValueError, match=said("reference")):
        kind.__ray_metadata__.modified_class("no such folder", config)


def test_who_has_its_gpu_or_asked_for_none_is_in_order(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpu("learner", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpu("learner", 1)


@pytest.mark.parametrize(("role", "gpus"), [("rollout", 0.5), ("learner", 2), ("reference", 0)])
def test_an_actor_is_told_what_its_bundle_has(
    config: Config, monkeypatch: pytest.MonkeyPatch, role: str, gpus: float
) -> None:
    config.rollout.tensor_parallel = 4
    placement = Placement([], 1.0)
    bundle = Bundle(role=role, index=3, cpus=8, gpus=2 if gpus else 0, labels={})
    monkeypatch.setattr(placement, "bundle", lambda *seat: {(role, 3): bundle}[seat])
    seen = getattr(placement.seen_from(config, role, 3).placement, role)
    assert (seen.gpus, seen.cpus) == (gpus, 2 if role == "rollout" else 8)
    assert getattr(config.placement, role).gpus == 0.5, "the run's own stays"
