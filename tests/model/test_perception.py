"""Perception: token order, rotations, gates, and a modality that is missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medtvt_rl.model.config import PerceptionConfig
from medtvt_rl.model.perception import Perception

SIZES = (5, 6, 7)
ALL = torch.ones(3, 3, dtype=torch.bool)


def build(tokens: int = 2, projector: str = "mlp", scale: float = 1.0) -> Perception:
    torch.manual_seed(0)
    config = PerceptionConfig(
        tokens_per_modality=tokens,
        num_heads=2,
        residual_scale=scale,
        projector=projector,  # type: ignore[arg-type]
    )
    return Perception(config, SIZES, 8).eval()


def features(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, size, generator=generator) for size in SIZES]


@pytest.mark.parametrize("projector", ["mlp", "gated"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_shapes_and_order(tokens: int, projector: str) -> None:
    perception = build(tokens, projector)
    output, gates = perception(features(), ALL)
    assert output.shape == (3, 3 * tokens, 8) and gates.shape == (3, 3)
    assert bool(((gates > 0) & (gates < 1)).all())
    fused = perception.fuse(perception.project(features(), ALL))
    for m, each in enumerate(fused):
        torch.testing.assert_close(output[:, m * tokens : (m + 1) * tokens], gates[:, m, None, None] * each)


def test_one_attention_serves_three_rotations() -> None:
    """Against the formula of the paper, written out."""
    perception = build(scale=0.3)
    ecg, cxr, lab = perception.project(features(), ALL)
    attend = perception.attention
    mean = (attend(cxr, ecg, lab)[0] + attend(ecg, lab, cxr)[0] + attend(lab, cxr, ecg)[0]) / 3
    expected = [perception.norm(each + 0.3 * mean) for each in (ecg, cxr, lab)]
    for found, wanted in zip(perception.fuse([ecg, cxr, lab]), expected):
        torch.testing.assert_close(found, wanted)
    e, c, l = (each.mean(1) for each in expected)  # noqa: E741
    weights = torch.sigmoid(perception.gate(torch.cat([c, e, l], -1)))
    torch.testing.assert_close(perception.gates(expected), weights[:, [1, 0, 2]])


def test_values_of_a_missing_modality_do_not_matter_and_the_stand_in_learns() -> None:
    perception = build()
    present = torch.tensor([[True, False, True]] * 3)
    first, second = features(), features()
    second[1] = torch.randn(3, SIZES[1])
    output, _ = perception(first, present)
    assert torch.equal(output, perception(second, present)[0])
    assert not torch.allclose(output, perception(first, ALL)[0])
    output.sum().backward()
    gradient = perception.stand_in.grad
    assert gradient is not None and gradient[1].abs().sum() > 0
    assert gradient[0].abs().sum() == 0 and gradient[2].abs().sum() == 0


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_modality"):
        build(tokens=0)
    with pytest.raises(ValueError, match="num_heads"):
        Perception(PerceptionConfig(num_heads=3), SIZES, 8)
    with pytest.raises(ValueError, match="projector"):
        build(projector="linear")
