"""IRM, against closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from some_outputs import CLASSES, K, outputs

from dmoe.objectives import CORAL, ERM, IRM, irm_penalty
from dmoe.tasks import Task


def gain(logits: np.ndarray, labels: np.ndarray) -> float:
    """Of cross-entropy: the mean over images of (p - y) . z, the derivative of the risk by a scale of z."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return float(np.mean(np.sum((p - np.eye(K)[labels]) * logits, axis=1)))


def test_irm_is_the_squared_derivative_of_each_domains_risk_by_a_scale() -> None:
    batch = outputs()
    logits, labels, domains = batch.logits.detach().numpy(), batch.labels.numpy(), batch.domains.numpy()
    expected = []
    for domain in (2, 4, 7):
        z, y = logits[domains == domain], labels[domains == domain]
        expected.append(gain(z[::2], y[::2]) * gain(z[1::2], y[1::2]))
    assert irm_penalty(CLASSES, batch).item() == pytest.approx(np.mean(expected))


def test_irm_of_one_logit_is_by_the_logistic_loss() -> None:
    batch = outputs([0] * 6, kind="binary")
    z, y = batch.logits.detach().squeeze(1), batch.labels
    each = (z.sigmoid() - y) * z
    expected = each[::2].mean() * each[1::2].mean()
    assert irm_penalty(Task("binary", num_outputs=1), batch).item() == pytest.approx(expected.item())


def test_gradient_of_irm_is_that_of_finite_differences() -> None:
    batch = outputs()
    assert torch.autograd.gradcheck(lambda logits: irm_penalty(CLASSES, batch._replace(logits=logits)), batch.logits)


def test_domain_of_a_single_image_is_no_fault() -> None:
    batch = outputs([1, 1, 2])
    assert irm_penalty(CLASSES, batch).isfinite()


def test_irm_has_weight_one_until_it_is_annealed_and_then_asks_for_a_restart() -> None:
    batch, objective = outputs(), IRM(CLASSES, penalty=50.0, anneal_steps=10)
    risk, penalty = F.cross_entropy(batch.logits, batch.labels), irm_penalty(CLASSES, batch)
    torch.testing.assert_close(objective.loss(batch, step=9), risk + penalty)
    torch.testing.assert_close(objective.loss(batch, step=10), risk + 50 * penalty)
    assert objective.restart_at == 10
    assert ERM(CLASSES).restart_at is CORAL(CLASSES, penalty=1.0).restart_at is None
