"""Entropies, classes and layers of normalisation."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from small_student import batch, features_by_batch, small_student, theta_of
from torch import nn

from dmoe.baselines.shared import class_logits, entropies, norm_parameters, normalising_by_batch, task_logits, with_statistics_of
from dmoe.errors import UserError
from dmoe.tasks import Task


def test_entropies_are_those_of_scipy() -> None:
    logits = 3 * torch.randn(5, 4, dtype=torch.float64)
    np.testing.assert_allclose(entropies(logits), entropy(logits.softmax(dim=1).numpy(), axis=1), rtol=1e-12)


def test_the_entropy_of_a_certain_prediction_has_a_gradient() -> None:
    logits = torch.tensor([[0.0, -2000.0, 500.0]], requires_grad=True)
    (found,) = torch.autograd.grad(entropies(logits).sum(), logits)
    assert torch.equal(found, torch.zeros(1, 3))


@pytest.mark.parametrize("task", [Task("binary", 1), Task("multiclass", 4)])
def test_logits_of_classes_have_the_probabilities_of_the_task(task: Task) -> None:
    logits = torch.randn(5, task.num_outputs, dtype=torch.float64)
    found = class_logits(logits, task)
    torch.testing.assert_close(found.softmax(dim=1), task.probabilities(logits))
    torch.testing.assert_close(task.probabilities(task_logits(found.log_softmax(dim=1), task)), task.probabilities(logits))


def test_parameters_of_every_kind_of_norm_are_named() -> None:
    inner = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.GroupNorm(1, 3, affine=False))
    module = nn.Sequential(nn.BatchNorm1d(3), inner, nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(3))
    assert norm_parameters("X", module) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias", "2.weight", "2.bias", "3.weight"]
    assert norm_parameters("X", nn.BatchNorm1d(3)) == ["weight", "bias"]
    with pytest.raises(UserError, match=r"^X: adapts layers of normalisation, and this network has none"):
        norm_parameters("X", nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)))


@pytest.mark.parametrize("source_weight", [0.0, 5.0])
def test_each_norm_takes_its_statistics_behind_those_before_it(source_weight: float) -> None:
    features = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double().eval()
    for norm in (features[0], features[2]):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    images = 2 * torch.randn(7, 3, dtype=torch.float64) + 1
    found = with_statistics_of(images, features, source_weight=source_weight)
    x, old = images.numpy(), source_weight / (source_weight + 7)
    for number in (0, 2):
        before, after = features[number], found[number]
        mean = old * before.running_mean.numpy() + (1 - old) * x.mean(axis=0)
        variance = old * before.running_var.numpy() + (1 - old) * x.var(axis=0)
        np.testing.assert_allclose(after.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(after.running_var, variance, rtol=1e-12)
        x = (x - mean) / np.sqrt(variance + before.eps)
        if number == 0:
            x = x @ features[1].weight.detach().numpy().T + features[1].bias.detach().numpy()
    np.testing.assert_allclose(found(images).detach(), x, rtol=1e-10)


def test_norms_that_go_by_the_batch_remember_nothing() -> None:
    student, images = small_student(), batch()
    buffers = {name: value.clone() for name, value in student.features.named_buffers()}
    found = normalising_by_batch(student.features)(images)
    torch.testing.assert_close(found, features_by_batch(theta_of(student), images), rtol=1e-11, atol=1e-12)
    assert all(torch.equal(value, buffers[name]) for name, value in student.features.named_buffers())
