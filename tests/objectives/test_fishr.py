"""Fishr, against gradients of single images and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from some_outputs import CLASSES, D, K, outputs
from torch import Tensor, nn

from dmoe.objectives import Fishr, Outputs
from dmoe.objectives.fishr import scatter, variances_of_gradients
from dmoe.tasks import Task


def told(head: nn.Linear, features: Tensor, labels: Tensor, domains: Tensor) -> Outputs:
    return Outputs(features, head(features), labels, domains)


def fishr(*, anneal_steps: int = 0, ema: float = 0.0) -> Fishr:
    return Fishr(CLASSES, head=nn.Linear(D, K), domains=[7, 2, 4], penalty=3.0, anneal_steps=anneal_steps, ema=ema).double()


@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
def test_variances_are_those_of_the_heads_gradients_by_single_images(kind: str) -> None:
    task = Task(kind, num_outputs=K if kind == "multiclass" else 1)  # type: ignore[arg-type]
    head = nn.Linear(D, task.num_outputs).double()
    features, labels = torch.randn(7, D, dtype=torch.float64), torch.arange(7) % 2
    each = []
    for feature, label in zip(features, labels, strict=True):
        by_weight, by_bias = torch.autograd.grad(task.loss(head(feature[None]), label[None]), [head.weight, head.bias])
        each.append(torch.cat([by_weight.flatten(), by_bias]).numpy())
    found = variances_of_gradients(task, told(head, features, labels, torch.zeros(7)))
    np.testing.assert_allclose(found.detach().numpy(), np.var(each, axis=0, ddof=1))


def test_penalty_is_the_squared_distance_of_the_domains_variances_from_their_mean() -> None:
    batch, objective = outputs(), fishr()
    each = np.stack([variances_of_gradients(CLASSES, part).detach().numpy() for part in batch.by_domain()])
    expected = np.mean([np.sum((one - each.mean(0)) ** 2) for one in each])
    risk = F.cross_entropy(batch.logits, batch.labels).item()
    assert objective.loss(batch, step=0).item() == pytest.approx(risk + 3 * expected)


def test_penalty_is_zero_between_domains_of_the_same_images() -> None:
    batch = outputs([1, 2] * 6)
    twice = Outputs(*(part.detach()[::2].repeat_interleave(2, dim=0) for part in batch[:3]), batch.domains)  # type: ignore[misc]
    parts = list(twice._replace(logits=twice.logits.requires_grad_()).by_domain())
    assert scatter([variances_of_gradients(CLASSES, part) for part in parts]).item() == pytest.approx(0, abs=1e-20)


def test_gradient_of_the_penalty_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    head, labels, domains = nn.Linear(D, K).double(), torch.arange(6) % K, torch.tensor([0, 0, 0, 1, 1, 1])
    features = torch.randn(6, D, dtype=torch.float64, requires_grad=True)

    def penalty(features: Tensor, weight: Tensor) -> Tensor:
        parts = Outputs(features, F.linear(features, weight, head.bias), labels, domains).by_domain()
        return scatter([variances_of_gradients(CLASSES, part) for part in parts])

    assert torch.autograd.gradcheck(penalty, (features, head.weight))


def test_variances_are_moving_averages_of_each_domain_and_gradients_are_of_this_batch() -> None:
    ema, objective = 0.75, fishr(ema=0.75)
    first, second = outputs([2, 4] * 6), outputs([2, 7] * 6)
    objective.loss(first, step=0)
    found = objective.loss(second, step=1)
    two, four = (variances_of_gradients(CLASSES, part) for part in first.by_domain())
    two_again, seven = (variances_of_gradients(CLASSES, part) for part in second.by_domain())
    averages = [(1 - ema) * (ema * two + two_again), (1 - ema) * four, (1 - ema) * seven]
    torch.testing.assert_close(objective.variances, torch.stack(averages).detach())
    penalty = scatter([ema * two.detach() + two_again, seven])
    expected = F.cross_entropy(second.logits, second.labels) + 3 * penalty
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, second.logits, retain_graph=True)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_penalty_counts_once_annealed_and_then_asks_for_a_restart() -> None:
    batch, objective = outputs(), fishr(anneal_steps=10)
    risk = F.cross_entropy(batch.logits, batch.labels)
    torch.testing.assert_close(objective.loss(batch, step=9), risk)
    assert objective.variances.any(), "averages begin at once"
    assert objective.loss(batch, step=10) > risk + 1e-6
    assert objective.restart_at == 10
