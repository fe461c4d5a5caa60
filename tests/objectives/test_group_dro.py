"""GroupDRO: its weights, and a problem whose minimax is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from some_outputs import CLASSES, outputs

from dmoe.objectives import ERM, GroupDRO, Objective, Outputs
from dmoe.tasks import Task


def test_weights_grow_exponentially_with_losses_and_weigh_them() -> None:
    objective = GroupDRO(CLASSES, domains=[7, 2, 4], weights_lr=0.5).double()
    weights = np.full(3, 1 / 3)
    for step in range(3):
        batch = outputs()
        losses = np.array([F.cross_entropy(part.logits, part.labels).item() for part in batch.by_domain()])
        weights = weights * np.exp(0.5 * losses)
        weights /= weights.sum()
        assert objective.loss(batch, step=step).item() == pytest.approx(weights @ losses)
        np.testing.assert_allclose(objective.weights.numpy(), weights)


def test_weights_are_no_part_of_the_gradient() -> None:
    batch, objective = outputs([2, 4] * 6), GroupDRO(CLASSES, domains=[2, 4], weights_lr=0.5).double()
    (found,) = torch.autograd.grad(objective.loss(batch, step=0), batch.logits)
    one, other = (F.cross_entropy(batch.logits[batch.domains == d], batch.labels[batch.domains == d]) for d in (2, 4))
    (expected,) = torch.autograd.grad(objective.weights[0] * one + objective.weights[1] * other, batch.logits)
    torch.testing.assert_close(found, expected)


def test_in_turns_domains_have_the_sum_that_they_have_together() -> None:
    """While weights stay: a batch of each domain alone, averaged, is the batch of all."""
    batch, objective = outputs(), GroupDRO(CLASSES, domains=[7, 2, 4], weights_lr=0.0).double()
    each = [objective.loss(part, step=0).item() for part in batch.by_domain()]
    assert objective.loss(batch, step=0).item() == pytest.approx(np.mean(each))


@pytest.mark.parametrize(("name", "expected"), [("erm", 1 / 3), ("group_dro", 1 / 2)])
def test_one_number_for_domains_of_0_0_and_1_is_their_mean_or_their_middle(name: str, expected: float) -> None:
    task = Task("regression", num_outputs=1)
    objective: Objective = ERM(task) if name == "erm" else GroupDRO(task, domains=[0, 1, 2], weights_lr=0.1).double()
    said = torch.zeros((), dtype=torch.float64, requires_grad=True)
    domains = torch.tensor([0, 1, 2])
    mean, count = 0.0, 0
    for step in range(600):
        logits = said.expand(3, 1)
        (slope,) = torch.autograd.grad(objective.loss(Outputs(logits, logits, domains // 2, domains), step=step), said)
        with torch.no_grad():
            said -= 0.05 * slope
        if step >= 300:
            mean, count = mean + said.item(), count + 1
    assert mean / count == pytest.approx(expected, abs=0.03)
