"""Fish, on quadratic losses of which everything is known."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmoe.objectives import Fish
from dmoe.tasks import Task

RANDOM = np.random.default_rng(0)
CURVED = [a @ a.T for a in RANDOM.normal(size=(3, 4, 4))]
CENTRES = RANDOM.normal(size=(3, 4))
START = RANDOM.normal(size=4)
CLASSES = Task("multiclass", num_outputs=3)


def gradient(domain: int, at: np.ndarray) -> np.ndarray:
    """Of the loss (x - c)' A (x - c) / 2."""
    return CURVED[domain] @ (at - CENTRES[domain])


def followed(order: Sequence[int], inner_lr: float) -> tuple[np.ndarray, np.ndarray]:
    """What Fish follows from the start, two images a domain, and where the parameters then are."""
    place = torch.tensor(START, requires_grad=True)

    def loss(domains: Tensor) -> Tensor:
        (domain,) = domains.unique().tolist()
        away = place - torch.tensor(CENTRES[domain])
        return away @ torch.tensor(CURVED[domain]) @ away / 2

    found = Fish(CLASSES, inner_lr=inner_lr).gradient(loss, [torch.tensor(order).repeat_interleave(2)], [place])
    assert found.isfinite() and place.grad is not None
    return place.grad.numpy(), place.detach().numpy()


def test_it_is_the_way_that_descending_from_domain_to_domain_goes() -> None:
    order, at = (2, 0, 1), START
    for domain in order:
        at = at - 0.05 * gradient(domain, at)
    found, place = followed(order, 0.05)
    np.testing.assert_allclose(found, (START - at) / (3 * 0.05))
    np.testing.assert_array_equal(place, START)


def test_over_both_orders_it_favours_gradients_that_agree() -> None:
    """The gradient of L1 + L2 - inner_lr / 2 * g1 . g2, halved; exactly, since the losses are quadratic."""
    found = (followed((0, 1), 0.1)[0] + followed((1, 0), 0.1)[0]) / 2
    one, other = gradient(0, START), gradient(1, START)
    by_product = CURVED[0] @ other + CURVED[1] @ one
    np.testing.assert_allclose(found, (one + other - 0.1 / 2 * by_product) / 2)


def test_with_small_inner_steps_it_is_the_gradient_of_the_mean_loss() -> None:
    expected = np.mean([gradient(domain, START) for domain in range(3)], axis=0)
    np.testing.assert_allclose(followed((0, 1, 2), 1e-9)[0], expected, rtol=1e-6)


def test_parameter_that_no_domain_uses_has_no_gradient() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    Fish(CLASSES, inner_lr=0.1).gradient(lambda domains: used.sum() * len(domains), [torch.tensor([0, 1])], [used, unused])
    assert unused.grad is None and used.grad is not None
