"""ARM-LL: gradient steps on a learned loss, and gradients of second order through them; against `higher` and differences."""

import copy

import higher
import pytest
import torch
from small_arms import TASK, K, episodes, network, refuse_gradient_that_differs
from torch import Tensor

from dmoe.baselines.arm_ll import ArmLl, LossNetwork

INNER_LR = 0.3


def arm(inner_steps: int = 1) -> ArmLl:
    loss = LossNetwork(num_outputs=K, width=6).double()
    return ArmLl(network(), loss, task=TASK, inner_lr=INNER_LR, inner_steps=inner_steps)


def by_higher(made: ArmLl, support: Tensor, query: Tensor, steps: int) -> Tensor:
    """Logits after the inner steps by another library, with its graph."""
    sgd = torch.optim.SGD(made.network.parameters(), lr=INNER_LR)
    with higher.innerloop_ctx(made.network, sgd, copy_initial_weights=False) as (inner, optimizer):
        for _ in range(steps):
            optimizer.step(made.loss(inner(support)).square().sum().sqrt())
        return inner(query)


@pytest.mark.parametrize("steps", [1, 2])
def test_adapted_student_is_that_of_higher(steps: int) -> None:
    made, (support, query) = arm(steps), episodes()
    expected = by_higher(made, support[0], query[0], steps)
    torch.testing.assert_close(made.adapt(support[0]).logits(query[0]), expected.detach())


@pytest.mark.parametrize("steps", [1, 2])
def test_second_order_gradients_are_those_of_higher(steps: int) -> None:
    made, (support, query) = arm(steps), episodes()
    parameters = list(made.parameters())
    weight = torch.randn(5, K, dtype=torch.float64)
    logits = torch.cat([by_higher(made, images, asked, steps) for images, asked in zip(support, query, strict=True)])
    expected = torch.autograd.grad((logits * weight).sum(), parameters)
    found = torch.autograd.grad((made.query_logits(support, query) * weight).sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_second_order_gradients_are_those_of_differences() -> None:
    made = arm()
    for module in made.loss:
        if isinstance(module, torch.nn.ReLU):
            module.forward = torch.nn.functional.softplus  # type: ignore[method-assign]
    refuse_gradient_that_differs(made, *episodes())


def test_batch_norm_goes_by_running_statistics_in_training_too() -> None:
    made, (support, query) = arm(), episodes()
    expected, before = made.query_logits(support, query), copy.deepcopy(made.state_dict())
    made.train()
    assert torch.equal(made.query_logits(support, query), expected)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_adapting_moves_features_and_head_and_leaves_the_network_alone() -> None:
    made, (support, _) = arm(), episodes()
    before = copy.deepcopy(made.state_dict())
    with torch.no_grad():  # wherever it is called
        student = made.adapt(support[0])
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    for name, value in student.features.named_parameters():
        assert not torch.equal(value, before[f"network.features.{name}"]), name
    assert not torch.equal(student.head.weight, before["network.head.weight"])
    assert not any(p.requires_grad for part in (student.features, student.head) for p in part.parameters())


def test_it_goes_on_from_a_student_it_returned() -> None:
    made, (support, query) = arm(), episodes()
    once = made.adapt(support[0])
    said = once.logits(query[0])
    twice = made.adapt(support[0], start=once)
    torch.testing.assert_close(twice.logits(query[0]), by_higher(made, support[0], query[0], 2).detach())
    assert torch.equal(once.logits(query[0]), said)
