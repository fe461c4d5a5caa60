"""SHOT-IM: its loss and its steps."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from small_student import batch, gradients, probabilities_by_batch, small_student, theta_of

from dmoe.baselines.shot_im import ShotIm, uninformed


def test_the_loss_is_mean_entropy_less_entropy_of_the_mean() -> None:
    logits = 2 * torch.randn(7, 4, dtype=torch.float64)
    p = logits.softmax(dim=1).numpy()
    assert float(uninformed(logits)) == pytest.approx(entropy(p, axis=1).mean() - entropy(p.mean(axis=0)), rel=1e-12)


def test_the_loss_is_zero_of_equal_predictions_and_least_of_certain_and_even_ones() -> None:
    assert float(uninformed(torch.randn(1, 4).expand(6, -1))) == pytest.approx(0, abs=1e-6)
    assert float(uninformed(1e3 * torch.eye(4))) == pytest.approx(-np.log(4))


def test_a_step_moves_all_features_by_finite_differences_and_not_the_head() -> None:
    student, images = small_student(), batch()
    theta = theta_of(student)

    def loss(t: dict[str, torch.Tensor]) -> torch.Tensor:
        p = probabilities_by_batch(student, t, images)
        mean = p.mean(dim=0)
        return (mean * mean.log()).sum() - (p * p.log()).sum(dim=1).mean()

    adapted = ShotIm(student, lr=0.3, steps=1).adapt(images)
    gradient = gradients(loss, theta, list(theta))
    expected = {name: value - 0.3 * gradient[name] for name, value in theta.items()}
    torch.testing.assert_close(theta_of(adapted), expected, rtol=1e-7, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(adapted.head.parameters(), student.head.parameters(), strict=True))


def test_the_loss_falls() -> None:
    student, images = small_student(), batch()
    levels = [float(uninformed(ShotIm(student, lr=0.01, steps=n).adapt(images).logits(images))) for n in (0, 5, 20)]
    assert levels[0] > levels[1] > levels[2]
