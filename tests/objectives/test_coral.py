"""CORAL, against numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from some_outputs import CLASSES, outputs

from dmoe.objectives import CORAL, coral_penalty


def test_coral_is_the_mean_distance_of_moments_over_pairs_of_domains() -> None:
    batch = outputs()
    features, domains = batch.features.detach().numpy(), batch.domains.numpy()
    each = [features[domains == domain] for domain in (2, 4, 7)]
    expected = [
        np.mean((one.mean(0) - other.mean(0)) ** 2) + np.mean((np.cov(one.T) - np.cov(other.T)) ** 2)
        for one, other in ((each[0], each[1]), (each[0], each[2]), (each[1], each[2]))
    ]
    assert coral_penalty(batch).item() == pytest.approx(np.mean(expected))
    risk = F.cross_entropy(batch.logits, batch.labels).item()
    assert CORAL(CLASSES, penalty=0.3).loss(batch, step=0).item() == pytest.approx(risk + 0.3 * np.mean(expected))


def test_coral_is_zero_between_domains_of_equal_moments_and_in_one_domain() -> None:
    batch = outputs([1, 2] * 4)
    half = batch.features[batch.domains == 1]
    moved = torch.stack([half, -half + 2 * half.mean(dim=0)], dim=1).flatten(0, 1)
    assert coral_penalty(batch._replace(features=moved)).item() == pytest.approx(0, abs=1e-20)
    assert coral_penalty(outputs([3] * 8)).item() == 0


def test_gradient_of_coral_is_that_of_finite_differences() -> None:
    batch = outputs([1, 2, 3] * 3)
    assert torch.autograd.gradcheck(lambda features: coral_penalty(batch._replace(features=features)), batch.features)


def test_domain_of_a_single_image_is_no_fault() -> None:
    batch = outputs([1, 1, 2])
    assert coral_penalty(batch).isfinite()
