"""Encoders: feature shapes, every kind, and refusals."""

from __future__ import annotations

import pytest
import torch

from medtvt_rl.model.config import CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig
from medtvt_rl.model.encoders import build_cxr_encoder, build_ecg_encoder, build_lab_encoder


@pytest.mark.parametrize("head", ["pool", "flat"])
@pytest.mark.parametrize("image_size", [96, 50])
def test_small_encoders_give_their_number_of_features(head: str, image_size: int) -> None:
    ecg = build_ecg_encoder(EcgEncoderConfig()).eval()
    cxr = build_cxr_encoder(CxrEncoderConfig(head=head, image_size=image_size, num_channels=3)).eval()  # type: ignore[arg-type]
    lab = build_lab_encoder(LabEncoderConfig()).eval()
    assert ecg(torch.randn(2, 12, 1000)).shape == (2, ecg.num_features)
    assert cxr(torch.randn(2, 3, image_size, image_size)).shape == (2, cxr.num_features)
    assert lab(torch.rand(2, 100)).shape == (2, lab.num_features)


def test_published_kinds_have_the_published_sizes() -> None:
    ecg = build_ecg_encoder(EcgEncoderConfig(kind="xresnet1d101")).eval()
    film = CxrEncoderConfig(kind="vit", image_size=32, num_channels=3, hidden_size=24, num_layers=1, num_heads=2)
    cxr = build_cxr_encoder(film).eval()
    lab = build_lab_encoder(LabEncoderConfig(kind="normalised", widths=[256, 1024, 1024])).eval()
    with torch.no_grad():
        assert ecg.sequence(torch.randn(1, 12, 1000)).shape == (1, 768, 32)
        assert ecg(torch.randn(1, 12, 1000)).shape == (1, 1024)
        torch.testing.assert_close(cxr(torch.randn(2, 3, 32, 32)).norm(dim=-1), torch.ones(2))
        torch.testing.assert_close(lab(torch.rand(2, 100)).norm(dim=-1), torch.ones(2))


def test_unknown_kinds_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.ecg.kind: 'lstm', expected 'conv'"):
        build_ecg_encoder(EcgEncoderConfig(kind="lstm"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.cxr.kind"):
        build_cxr_encoder(CxrEncoderConfig(kind="resnet"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.lab.widths"):
        build_lab_encoder(LabEncoderConfig(widths=[]))
