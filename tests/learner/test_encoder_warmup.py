"""Encoders learn findings that are there to be seen, and only from studies that have them."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medtvt_rl.data.labels import ALL_FINDINGS, FINDINGS
from medtvt_rl.learner.config import EncoderWarmupConfig
from medtvt_rl.learner.encoder_warmup import EncoderWarmup, area_under_curve

torch.set_num_threads(1)


class Encoder(nn.Module):
    """Linear, with a BatchNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = 16
        self.layers = nn.Sequential(nn.Linear(size, 16), nn.BatchNorm1d(16), nn.ReLU())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layers(values)


class Studies:
    """Items whose values show the study's findings; every tenth study lacks its ECG, which then holds NaN."""

    def study_ids(self, split: str) -> list[str]:
        return [f"{split}-{i}" for i in range(200 if split == "train" else 60)]

    def findings(self, study_id: str) -> dict[str, bool] | None:
        if study_id.endswith("-7"):
            return None
        generator = np.random.default_rng(zlib.crc32(study_id.encode()))
        return dict(zip(ALL_FINDINGS, (generator.random(len(ALL_FINDINGS)) < 0.4).tolist()))

    def get(self, item_id: str) -> dict[str, np.ndarray[Any, Any]]:
        findings = self.findings(item_id) or dict.fromkeys(ALL_FINDINGS, False)
        item = {m: np.array([findings[name] for name in names], np.float32) for m, names in FINDINGS.items()}
        has_ecg = not item_id.endswith("0")
        if not has_ecg:
            item["ecg"][:] = np.nan
        return {**item, "present": np.array([has_ecg, True, True])}


def _tower() -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(encoders=tuple(Encoder(len(names)) for names in FINDINGS.values()))


def test_auc_of_what_can_be_seen_is_high_and_encoders_end_in_evaluation_mode() -> None:
    tower, told = _tower(), list[tuple[str, int, int]]()
    config = EncoderWarmupConfig(ecg_steps=120, cxr_steps=120, lab_steps=0, learning_rate=2e-2)
    studies = Studies()
    aucs = EncoderWarmup(tower, studies, studies, config, 0, torch.device("cpu"), lambda *step: told.append(step)).run()
    assert set(aucs) <= {f"auc/{name}" for name in (*FINDINGS["ecg"], *FINDINGS["cxr"])}
    assert min(aucs.values()) > 0.95
    assert told[0] == ("ecg", 1, 120) and told[-1] == ("cxr", 120, 120)
    assert not any(encoder.training for encoder in tower.encoders[:2])
    untouched = _tower().encoders[2].state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in tower.encoders[2].state_dict().items())


def test_bfloat16_encoders_are_trained_in_float32_and_stay_bfloat16() -> None:
    tower = _tower()
    for encoder in tower.encoders:
        encoder.to(torch.bfloat16)
    config, studies = EncoderWarmupConfig(ecg_steps=0, cxr_steps=120, lab_steps=0, learning_rate=2e-2), Studies()
    aucs = EncoderWarmup(tower, studies, studies, config, 0, torch.device("cpu"), lambda *step: None).run()
    assert min(aucs.values()) > 0.95
    assert {p.dtype for encoder in tower.encoders for p in encoder.parameters()} == {torch.bfloat16}


def test_unknown_findings_are_refused() -> None:
    studies = Studies()
    studies.findings = lambda study_id: None  # type: ignore[method-assign]
    warmup = EncoderWarmup(
        _tower(), studies, studies, EncoderWarmupConfig(), 0, torch.device("cpu"), lambda *step: None
    )
    with pytest.raises(ValueError, match=r"encoders\.ecg_steps: no training study has known ecg findings"):
        warmup.run()


def test_the_area_counts_pairs_in_order_and_half_of_the_ties() -> None:
    truth = np.array([True, True, False, False])
    assert area_under_curve(truth, np.array([0.9, 0.5, 0.5, 0.1], dtype=np.float32)) == 3.5 / 4
