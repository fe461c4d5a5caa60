"""Objectives of several source domains, against numpy and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.objectives import CORAL, ERM, IRM, Outputs, coral_penalty, irm_penalty
from dmoe.tasks import Task

CLASSES = Task("multiclass", num_outputs=4)
B, D, K = 24, 5, 4


def outputs(domains: list[int] | None = None, *, kind: str = "multiclass") -> Outputs:
    """Interleaved domains, three unless told."""
    chosen = torch.tensor(domains or [7, 2, 4] * 8)
    count = len(chosen)
    labels = torch.randint(K, (count,)) if kind == "multiclass" else torch.randint(2, (count,))
    logits = 2 * torch.randn(count, K if kind == "multiclass" else 1, dtype=torch.float64)
    features = torch.randn(count, D, dtype=torch.float64) * (1 + chosen[:, None])
    return Outputs(features.requires_grad_(), logits.requires_grad_(), labels, chosen)


def test_erm_is_the_task_loss() -> None:
    batch = outputs()
    assert torch.equal(ERM(CLASSES).loss(batch, step=0), F.cross_entropy(batch.logits, batch.labels))


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
    assert irm_penalty(CLASSES, batch).isfinite() and coral_penalty(batch).isfinite()


def test_irm_has_weight_one_until_it_is_annealed_and_then_asks_for_a_restart() -> None:
    batch, objective = outputs(), IRM(CLASSES, penalty=50.0, anneal_steps=10)
    risk, penalty = F.cross_entropy(batch.logits, batch.labels), irm_penalty(CLASSES, batch)
    torch.testing.assert_close(objective.loss(batch, step=9), risk + penalty)
    torch.testing.assert_close(objective.loss(batch, step=10), risk + 50 * penalty)
    assert objective.restart_at == 10
    assert ERM(CLASSES).restart_at is CORAL(CLASSES, penalty=1.0).restart_at is None


def test_parts_by_domain_are_all_images_of_it() -> None:
    batch = outputs()
    found: dict[int, Tensor] = {int(part.domains[0]): part.logits for part in batch.by_domain()}
    assert list(found) == [2, 4, 7]
    assert all(torch.equal(logits, batch.logits[batch.domains == domain]) for domain, logits in found.items())
