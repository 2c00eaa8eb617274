"""The learning rate's landmarks."""

from __future__ import annotations

import pytest

from medtvt_rl.learner.schedule import linear_decay, warmup_cosine


def test_rises_linearly_then_falls_by_a_half_cosine() -> None:
    rates = [warmup_cosine(step, 105, 2.0, 4, 0.1) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(2.0 * 0.55)
    assert rates[104] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_no_warmup_and_one_step() -> None:
    assert warmup_cosine(0, 1, 3.0, 0, 0.5) == 3.0
    assert warmup_cosine(99, 10, 3.0, 0, 0.5) == pytest.approx(1.5)


def test_linear_decay_warms_up_and_ends_at_its_share() -> None:
    rates = [linear_decay(step, 101, 1.0, 5, 0.1) for step in (0, 4, 50, 100)]
    assert rates == pytest.approx([0.2, 0.964, 0.55, 0.1])
