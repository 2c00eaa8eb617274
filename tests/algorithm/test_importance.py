"""Importance weights against hand-computed values."""

import math

import pytest
import torch

from medtvt_rl.algorithm.config import ImportanceConfig
from medtvt_rl.algorithm.importance import importance_weights

PROXIMAL = torch.tensor([[math.log(3.0), math.log(0.5), 0.0], [0.2, float("nan"), float("inf")]])
BEHAVIOUR = torch.tensor([[0.0, 0.0, 0.0], [0.0, float("-inf"), float("nan")]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def weights(mode, level, cap=2.0, floor=0.0):
    return importance_weights(PROXIMAL, BEHAVIOUR, MASK, ImportanceConfig(mode=mode, level=level, cap=cap, floor=floor))


@pytest.mark.parametrize(
    ("mode", "level", "expected", "num_cut"),
    [
        ("none", "token", [[1, 1, 1], [1, 0, 0]], 0),
        ("truncated", "token", [[2, 0.5, 1], [math.exp(0.2), 0, 0]], 1),
        ("masked", "token", [[0, 0.5, 1], [math.exp(0.2), 0, 0]], 1),
        ("truncated", "sequence", [[1.5, 1.5, 1.5], [math.exp(0.2), 0, 0]], 0),
        ("masked", "sequence", [[1.5, 1.5, 1.5], [math.exp(0.2), 0, 0]], 0),
    ],
)
def test_by_hand(mode, level, expected, num_cut):
    found, cut = weights(mode, level)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    assert int(cut.sum()) == num_cut


def test_sequence_level_cuts_every_token_of_the_sequence():
    found, cut = weights("masked", "sequence", cap=1.4)
    assert found[0].tolist() == [0, 0, 0]
    assert cut.tolist() == [[True, True, True], [False, False, False]]


def test_masking_drops_small_ratios_too_and_truncation_leaves_them():
    found, cut = weights("masked", "token", floor=0.6)
    torch.testing.assert_close(found, torch.tensor([[0, 0, 1], [math.exp(0.2), 0, 0]]), atol=1e-6, rtol=0)
    assert cut.tolist() == [[True, True, False], [False, False, False]]
    assert weights("truncated", "token", floor=0.6)[0][0, 1] == pytest.approx(0.5)


def test_exploding_ratio_is_capped_and_carries_no_gradient():
    proximal = torch.tensor([[0.0]], requires_grad=True)
    found, cut = importance_weights(proximal, torch.tensor([[-1e6]]), torch.tensor([[True]]), ImportanceConfig())
    assert found.tolist() == [[2.0]] and bool(cut.all())
    assert not found.requires_grad


@pytest.mark.parametrize("change", [{"mode": "clip"}, {"level": "group"}, {"cap": 0.0}, {"floor": 2.0}])
def test_rejects_unknown_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        importance_weights(PROXIMAL, BEHAVIOUR, MASK, ImportanceConfig(**change))
