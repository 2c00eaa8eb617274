"""KL estimators against hand-computed values and against the exact KL."""

import math

import numpy as np
import pytest
import torch

from medtvt_rl.algorithm.kl import sequence_kl, token_kl


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -1.0]),
        ("k2", [0.125, 0.5]),
        ("k3", [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]),
    ],
)
def test_by_hand(estimator, expected):
    found = token_kl(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0]), estimator)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_exact_kl(estimator):
    policy = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    estimate = (policy * token_kl(policy.log(), reference.log(), estimator)).sum()
    assert estimate.item() == pytest.approx(exact.item(), abs=1e-12)


def test_k2_gradient_is_that_of_the_kl():
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    (estimate,) = torch.autograd.grad((logprobs.exp().detach() * token_kl(logprobs, reference, "k2")).sum(), logits)
    torch.testing.assert_close(estimate, exact)


def test_extreme_differences_stay_finite():
    found = token_kl(torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0]), "k3")
    assert torch.isfinite(found).all()


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k3"):
        token_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_sequence_kl_sums_tokens():
    behaviour, reference = np.array([-1.0, -3.0], np.float32), np.array([-1.5, -2.0], np.float32)
    assert sequence_kl(behaviour, reference, "k1") == pytest.approx(-0.5, abs=1e-6)
    assert sequence_kl(behaviour, reference, "k2") == pytest.approx(0.625, abs=1e-6)
    assert sequence_kl(behaviour[:0], reference[:0], "k3") == 0.0
