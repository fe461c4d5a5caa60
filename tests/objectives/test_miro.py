"""MIRO, against scipy's Gaussian; and what it keeps of the network that it began with."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from some_outputs import CLASSES, D, outputs
from torch import nn

from dmoe.objectives import MIRO
from dmoe.objectives.miro import ENCODER_SPEED, FIRST_VARIANCE, LEAST_VARIANCE, unlikelihood


def features() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, D), nn.BatchNorm1d(D)).double()


def test_it_is_the_negative_log_likelihood_up_to_a_constant() -> None:
    values, mean, variance = np.random.default_rng(0).normal(size=(3, 6, D))
    variance = np.exp(variance[0])
    expected = np.mean(-norm.logpdf(values, mean, np.sqrt(variance)) - 0.5 * np.log(2 * np.pi))
    found = unlikelihood(*(torch.tensor(each) for each in (values, mean, variance)))
    assert found.item() == pytest.approx(expected)


def test_loss_is_the_task_loss_and_how_unlikely_the_first_features_are() -> None:
    network, batch, images = features(), outputs(), torch.randn(24, 3, dtype=torch.float64)
    objective = MIRO(CLASSES, features=network, width=D, penalty=0.3).double()
    before = network.eval()(images).detach()
    with torch.no_grad():
        network[0].weight.zero_()
    found = objective.loss(batch._replace(images=images), step=0)
    torch.testing.assert_close(F.softplus(ENCODER_SPEED * objective.encoder) + LEAST_VARIANCE, torch.full((D,), 0.1).double())
    variance = torch.full((D,), FIRST_VARIANCE, dtype=torch.float64)
    expected = F.cross_entropy(batch.logits, batch.labels) + 0.3 * unlikelihood(before, batch.features, variance)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pretrained_features_have_no_gradient_and_keep_their_statistics() -> None:
    objective = MIRO(CLASSES, features=features().train(), width=D, penalty=1.0).double()
    before = {name: value.clone() for name, value in objective.pretrained.state_dict().items()}
    objective.loss(outputs()._replace(images=torch.randn(24, 3, dtype=torch.float64)), step=0).backward()
    assert all(torch.equal(value, before[name]) for name, value in objective.pretrained.state_dict().items())
    assert [name for name, each in objective.named_parameters() if each.grad is not None] == ["encoder"]


def test_best_variance_is_the_mean_squared_deviation() -> None:
    values, mean = torch.randn(2, 50, D, dtype=torch.float64)
    variance = (values - mean).square().mean(dim=0).requires_grad_()
    (slope,) = torch.autograd.grad(unlikelihood(values, mean, variance), variance)
    torch.testing.assert_close(slope, torch.zeros_like(slope))
