"""Adam's schedules against formulas, and its steps against torch's own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmoe.config import Duration, OptimizerConfig
from dmoe.optimizers import SKIPPED, ScheduledAdam, step_if_finite

STEPS, PER_EPOCH = 40, 10


def scheduled(parameters: list[Tensor], **fields: Any) -> ScheduledAdam:
    return ScheduledAdam(parameters, OptimizerConfig(**{"lr": 0.1, **fields}), steps=STEPS, steps_per_epoch=PER_EPOCH)


def rates(**fields: Any) -> list[float]:
    adam = scheduled([torch.zeros(1, requires_grad=True)], **fields)
    return [adam.learning_rate(step) for step in range(STEPS)]


def steps_of(adam: ScheduledAdam, gradients: list[Tensor], start: int = 0) -> list[float]:
    norms = []
    for number, gradient in enumerate(gradients, start):
        adam.parameters[0].grad = gradient.clone()
        norms.append(adam.clip())
        adam.step(number)
    return norms


def after_torch_adam(gradients: list[Tensor], lr: float = 0.1, **settings: Any) -> Tensor:
    value = torch.ones(3, requires_grad=True)
    adam = torch.optim.Adam([value], lr=lr, **settings)
    for gradient in gradients:
        value.grad = gradient
        adam.step()
    return value.detach()


@pytest.fixture
def gradients() -> list[Tensor]:
    return [torch.tensor([3.0, -4.0, 0.0]), torch.tensor([0.1, 0.2, -0.2]), torch.tensor([-6.0, 0.0, 8.0])]


def test_a_constant_rate_does_not_change() -> None:
    assert rates() == [0.1] * STEPS


def test_an_exponential_rate_falls_once_an_epoch() -> None:
    expected = [0.1 * 0.5**epoch for epoch in range(4) for _ in range(PER_EPOCH)]
    assert rates(schedule="exponential", decay_per_epoch=0.5) == pytest.approx(expected)


def test_a_cosine_rate_falls_to_nothing_at_the_end_of_the_training() -> None:
    found = rates(schedule="cosine")
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 40)) for step in range(STEPS)])
    assert found[0] == pytest.approx(0.1)
    assert found[20] == pytest.approx(0.05)


@pytest.mark.parametrize("warmup", ["5 steps", "0.5 epochs"])
def test_warm_up_is_a_linear_rise_to_the_full_rate(warmup: str) -> None:
    assert rates(warmup=Duration.parse(warmup)) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1] + 35 * [0.1])


def test_a_cosine_falls_from_the_full_rate_once_warm_up_is_over() -> None:
    rise = [0.1 * (step + 1) / 10 for step in range(10)]
    expected = rise + [0.05 * (1 + math.cos(math.pi * step / 30)) for step in range(30)]
    assert rates(schedule="cosine", warmup=Duration.parse("1 epoch")) == pytest.approx(expected)


def test_steps_are_those_of_torchs_adam_at_the_scheduled_rate(gradients: list[Tensor]) -> None:
    value = torch.ones(3, requires_grad=True)
    steps_of(scheduled([value], l2=0.3), gradients)
    assert torch.equal(value, after_torch_adam(gradients, weight_decay=0.3))


def test_a_step_uses_the_rate_of_its_number(gradients: list[Tensor]) -> None:
    value = torch.ones(3, requires_grad=True)
    steps_of(scheduled([value], schedule="exponential", decay_per_epoch=0.5), gradients, start=PER_EPOCH)
    assert torch.equal(value, after_torch_adam(gradients, lr=0.05))


def test_gradients_are_scaled_down_to_the_norm_allowed(gradients: list[Tensor]) -> None:
    value = torch.ones(3, requires_grad=True)
    steps_of(scheduled([value], max_gradient_norm=1.0), gradients)
    clipped = [g / max(1.0, g.norm().item()) for g in gradients]
    torch.testing.assert_close(value.detach(), after_torch_adam(clipped), rtol=1e-5, atol=1e-6)
    assert (value.detach() - after_torch_adam(gradients)).abs().max() > 1e-3


@pytest.mark.parametrize("limit", [None, 1.0])
def test_the_norm_told_is_the_one_before_clipping(gradients: list[Tensor], limit: float | None) -> None:
    adam = scheduled([torch.ones(3, requires_grad=True)], max_gradient_norm=limit)
    assert steps_of(adam, gradients) == pytest.approx([5.0, 0.3, 10.0])


def test_gradients_of_all_parameters_are_clipped_together() -> None:
    one, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    adam = scheduled([one, other], max_gradient_norm=1.0)
    one.grad, other.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert adam.clip() == pytest.approx(5.0)
    assert torch.cat([one.grad, other.grad]).tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("bad", ["a gradient", "a value"])
def test_without_finite_numbers_no_optimizer_does_anything(gradients: list[Tensor], bad: str) -> None:
    adams = {name: scheduled([torch.ones(3, requires_grad=True)]) for name in ("one norm", "other norm")}
    for number, gradient in enumerate(gradients):
        for adam in adams.values():
            adam.parameters[0].grad = gradient.clone()
        assert SKIPPED not in step_if_finite(number, {"loss": 1.0}, adams)
    weights = {name: adam.parameters[0].clone() for name, adam in adams.items()}
    moments = {name: adam.adam.state[adam.parameters[0]]["exp_avg"].clone() for name, adam in adams.items()}
    for adam in adams.values():
        adam.parameters[0].grad = gradients[0].clone()
    if bad == "a gradient":
        adams["other norm"].parameters[0].grad = torch.tensor([1.0, math.nan, 1.0])
    values = step_if_finite(3, {"loss": math.inf if bad == "a value" else 1.0}, adams)
    assert values[SKIPPED] == 1.0 and set(values) == {"loss", "one norm", "other norm", SKIPPED}
    for name, adam in adams.items():
        assert torch.equal(adam.parameters[0], weights[name])
        assert torch.equal(adam.adam.state[adam.parameters[0]]["exp_avg"], moments[name])
        assert adam.parameters[0].grad is None


def test_a_step_clears_the_gradients(gradients: list[Tensor]) -> None:
    adam = scheduled([torch.ones(3, requires_grad=True)])
    steps_of(adam, gradients)
    assert adam.parameters[0].grad is None


def test_a_restart_forgets_the_moments(gradients: list[Tensor]) -> None:
    value = torch.ones(3, requires_grad=True)
    adam = scheduled([value])
    steps_of(adam, gradients)
    with torch.no_grad():
        value.fill_(1)
    adam.restart()
    steps_of(adam, gradients[1:])
    assert torch.equal(value, after_torch_adam(gradients[1:]))


@pytest.mark.parametrize("changed", ["gradients", "moments", "parameters"])
def test_the_layout_in_memory_does_not_matter(changed: str) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3, 5, 5), [torch.randn(4, 3, 5, 5) for _ in range(4)]
    found = []
    for other in (False, True):
        weight = nn.Parameter(start.clone())
        adam = ScheduledAdam([weight], OptimizerConfig(lr=0.1), steps=4, steps_per_epoch=1)
        for number, gradient in enumerate(gradients):
            weight.grad = gradient.clone()
            if other and number == 2:
                if changed == "gradients":
                    weight.grad = gradient.contiguous(memory_format=torch.channels_last)
                elif changed == "parameters":
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                else:
                    state = adam.adam.state[weight]
                    state["exp_avg"] = state["exp_avg"].contiguous(memory_format=torch.channels_last)
            adam.step(number)
        found.append(weight.detach().clone())
    assert torch.equal(*found)
