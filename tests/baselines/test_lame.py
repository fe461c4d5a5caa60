"""LAME: affinities by numpy, and the fixed point."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from small_student import batch, small_student

from dmoe.baselines import lame
from dmoe.baselines.lame import Lame, adjusted, affinities


def objective(z: np.ndarray, q: np.ndarray, w: np.ndarray) -> float:
    pairs = sum(w[i, j] * z[i] @ z[j] for i in range(len(z)) for j in range(len(z)))
    return float((z * (np.log(z) - np.log(q))).sum() - pairs / 2)


def case(kind: lame.Affinity, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(count, 5, dtype=torch.float64)
    return 1.5 * torch.randn(count, 3, dtype=torch.float64), affinities(features, kind=kind, neighbours=3)


def test_affinities_are_those_of_directions() -> None:
    features = torch.randn(9, 4, dtype=torch.float64)
    u = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    distance = np.array([[np.linalg.norm(a - b) for b in u] for a in u])
    order = [sorted((j for j in range(9) if j != i), key=lambda j, i=i: distance[i, j])[:3] for i in range(9)]
    knn = np.array([[((j in order[i]) + (i in order[j])) / 2 for j in range(9)] for i in range(9)])
    np.testing.assert_array_equal(affinities(features, kind="knn", neighbours=3), knn)
    width = np.mean([distance[i, order[i][-1]] for i in range(9)])
    rbf = affinities(features, kind="rbf", neighbours=3).numpy()
    np.testing.assert_allclose(rbf, np.exp(-(distance**2) / (2 * width**2)), rtol=1e-10)
    assert np.linalg.eigvalsh(rbf).min() > -1e-12


@pytest.mark.parametrize("kind", ["knn", "rbf"])
def test_the_result_is_where_the_objective_is_flat(kind: lame.Affinity) -> None:
    logits, w = case(kind)
    z = adjusted(logits, w).exp().numpy()
    np.testing.assert_allclose(z.sum(axis=1), 1)
    slope = np.log(z) - np.log(softmax(logits.numpy(), axis=1)) + 1 - w.numpy() @ z
    tangential = slope - slope.mean(axis=1, keepdims=True)  # on the simplex, only differences within a row count
    np.testing.assert_allclose(tangential, 0, atol=1e-5)


@pytest.mark.parametrize("kind", ["knn", "rbf"])
def test_the_objective_never_rises(kind: lame.Affinity, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, w = case(kind)
    q, levels = softmax(logits.numpy(), axis=1), []
    for steps in range(12):
        monkeypatch.setattr(lame, "STEPS", steps)
        levels.append(objective(adjusted(logits, w).exp().numpy(), q, w.numpy()))
    assert all(after <= before + 1e-12 for before, after in pairwise(levels))
    assert levels[-1] < levels[0] - 0.1


def test_no_descent_of_scipy_from_there_gets_lower() -> None:
    logits, w = case("rbf", count=6)
    q = softmax(logits.numpy(), axis=1)
    found = adjusted(logits, w).numpy()
    further = minimize(lambda x: objective(softmax(x.reshape(q.shape), axis=1), q, w.numpy()), found.ravel())
    assert further.fun == pytest.approx(objective(np.exp(found), q, w.numpy()), abs=1e-7)


def test_logits_are_corrected_in_groups_of_the_supports_size() -> None:
    student, images = small_student(), batch(11)
    found = Lame(student, neighbours=2).adapt(batch(4)).logits(images)
    for group in (range(4), range(4, 8), range(8, 11)):
        part = images[list(group)]
        w = affinities(student.features(part).detach(), kind="knn", neighbours=2)
        torch.testing.assert_close(found[list(group)], adjusted(student.logits(part), w))


def test_an_image_alone_is_predicted_as_before() -> None:
    student, images = small_student(), batch(5)
    found = Lame(student).adapt(batch(1)).logits(images)
    np.testing.assert_allclose(found, log_softmax(student.logits(images).numpy(), axis=1), rtol=1e-10)


def test_equal_images_are_alike() -> None:
    w = affinities(torch.ones(4, 3, dtype=torch.float64), kind="rbf", neighbours=2)
    assert w.isfinite().all() and math.isclose(float(w.diagonal().min()), 1)
