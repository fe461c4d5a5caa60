"""MMD, against numpy and a closed form."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from some_outputs import CLASSES, outputs

from dmoe.objectives import MMD, mmd_penalty
from dmoe.objectives.mmd import GAMMAS, squared_mmd


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The kernels' sum, averaged over all pairs of points, one after the other."""
    return float(np.mean([sum(math.exp(-gamma * np.sum((x - y) ** 2)) for gamma in GAMMAS) for x in one for y in other]))


def test_mmd_is_the_distance_of_mean_embeddings_over_pairs_of_domains() -> None:
    batch = outputs()
    features, domains = batch.features.detach().numpy(), batch.domains.numpy()
    each = [features[domains == domain] for domain in (2, 4, 7)]
    expected = np.mean([similarity(a, a) + similarity(b, b) - 2 * similarity(a, b) for a, b in combinations(each, 2)])
    assert mmd_penalty(batch).item() == pytest.approx(expected)
    risk = F.cross_entropy(batch.logits, batch.labels).item()
    assert MMD(CLASSES, penalty=0.3).loss(batch, step=0).item() == pytest.approx(risk + 0.3 * expected)


@pytest.mark.parametrize("distance", [0.0, 0.01, 1.0, 100.0])
def test_two_points_are_as_far_apart_as_their_kernels_say(distance: float) -> None:
    one, other = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[distance, 0.0]] * 2, dtype=torch.float64)
    expected = sum(2 - 2 * math.exp(-gamma * distance**2) for gamma in GAMMAS)
    assert squared_mmd(one, other).item() == pytest.approx(expected)


def test_mmd_is_zero_between_equal_samples_and_in_one_domain() -> None:
    sample = torch.randn(8, 3, dtype=torch.float64)
    assert squared_mmd(sample, sample.flip(0)).item() == pytest.approx(0, abs=1e-12)
    assert mmd_penalty(outputs([3] * 8)).item() == 0


def test_gradient_of_mmd_is_that_of_finite_differences() -> None:
    batch = outputs([1, 2, 3] * 3)
    features = (0.3 * batch.features.detach()).requires_grad_()  # near enough for kernels to see one another
    assert torch.autograd.gradcheck(lambda found: mmd_penalty(batch._replace(features=found)), features)
