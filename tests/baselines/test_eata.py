"""EATA: which images count, the Fisher information, and the steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from small_student import AFFINE, batch, entropies_by_batch, gradients, probabilities_by_batch, small_student, theta_of

from dmoe.baselines import eata
from dmoe.baselines.eata import Eata, fisher, worth
from dmoe.models.student import Student


def worth_by_hand(p: np.ndarray, average: np.ndarray | None, certain: float, redundant: float) -> np.ndarray:
    limit, found = certain * np.log(p.shape[1]), []
    for row in p:
        kept = entropy(row) < limit
        if average is not None:
            kept = kept and row @ average / np.linalg.norm(row) / np.linalg.norm(average) < redundant
        found.append(np.exp(limit - entropy(row)) if kept else 0.0)
    return np.array(found)


@pytest.mark.parametrize("average", [None, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)])
def test_certain_and_new_images_count_by_their_certainty(average: torch.Tensor | None) -> None:
    logits = 2 * torch.randn(60, 3, dtype=torch.float64)
    found = worth(logits, average, certain=0.6, redundant=0.7)
    expected = worth_by_hand(logits.softmax(dim=1).numpy(), None if average is None else average.numpy(), 0.6, 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    assert 0 < np.count_nonzero(expected) < 60


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_fisher_information_is_the_mean_of_squared_gradients_of_single_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eata, "AT_ONCE", 4)
    student, images = small_student(kind), batch(10)
    found = fisher(student, AFFINE, images)
    parameters = [student.features.get_parameter(name) for name in AFFINE]
    total = [torch.zeros(4, dtype=torch.float64) for _ in AFFINE]
    for image in images:
        logits = student.head(student.features(image[None]))
        if kind == "binary":
            loss = F.binary_cross_entropy_with_logits(logits, (logits > 0).double())
        else:
            loss = F.cross_entropy(logits, logits.argmax(dim=1))
        total = [t + g**2 / 10 for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
    for name, expected in zip(AFFINE, total, strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)


def test_steps_are_those_of_the_weighted_entropy_and_the_penalty() -> None:
    """Two batches of one step each, so that momentum, moving average and penalty all count in the second."""
    student, source, batches = small_student(sharpness=4), batch(6), [batch(20), batch(20)]
    settings = {"lr": 0.05, "certain": 0.7, "redundant": 0.8, "fisher_weight": 50.0}
    method = Eata(student, source=source, **settings)
    first = method.adapt(batches[0])
    second = method.adapt(batches[1], start=first)

    information, beginning = fisher(student, AFFINE, source), theta_of(student)
    theta, velocity, average = theta_of(student), dict.fromkeys(AFFINE, torch.zeros(4, dtype=torch.float64)), None
    for images in batches:
        p = probabilities_by_batch(student, theta, images).detach().numpy()
        weights = torch.from_numpy(worth_by_hand(p, average, 0.7, 0.8))
        kept = p[weights.numpy() > 0]
        assert 0 < len(kept) < len(images)

        def loss(t: dict[str, torch.Tensor], x: torch.Tensor = images, w: torch.Tensor = weights) -> torch.Tensor:
            penalty = sum((information[name] * (t[name] - beginning[name]) ** 2).sum() for name in AFFINE)
            return (w * entropies_by_batch(student, t, x)).sum() / (w > 0).sum() + 50.0 * penalty

        gradient = gradients(loss, theta, AFFINE)
        velocity = {name: 0.9 * velocity[name] + gradient[name] for name in AFFINE}
        theta |= {name: theta[name] - 0.05 * velocity[name] for name in AFFINE}
        average = kept.mean(axis=0) if average is None else 0.9 * average + 0.1 * kept.mean(axis=0)
    torch.testing.assert_close(theta_of(second), theta, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(second.average, average, rtol=1e-6)


def drift(adapted: Student, student: Student) -> float:
    after, before = theta_of(adapted), theta_of(student)
    return sum(float((after[name] - before[name]).square().sum()) for name in AFFINE)


def test_the_penalty_holds_the_weights_back() -> None:
    student, source, images = small_student(), batch(6), batch()
    free, held = (
        drift(Eata(student, source=source, lr=0.02, steps=20, certain=1, fisher_weight=weight).adapt(images), student)
        for weight in (0.0, 500.0)
    )
    assert 0 < held < free / 2


def test_without_certain_images_no_step_is_taken() -> None:
    student, images = small_student(), batch()
    adapted = Eata(student, source=batch(2), certain=1e-6, steps=3).adapt(images)
    assert drift(adapted, student) == 0
    assert adapted.average is None
