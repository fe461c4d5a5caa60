"""SAR: its two-step gradient, its filter, and its recovery."""

import math

import pytest
import torch
from small_student import AFFINE, K, batch, entropies_by_batch, gradients, small_student, theta_of

from dmoe.baselines.sar import Sar, moved, uphill


def test_uphill_is_one_step_of_that_length_along_the_gradient() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    torch.testing.assert_close(uphill(gradients, 0.5), [torch.tensor([0.3, 0.0]), torch.tensor([[0.4]])])


def test_parameters_come_back_to_the_bit() -> None:
    parameter = torch.rand(100)
    before = parameter.clone()
    with moved([parameter], [torch.rand(100)]):
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)


def test_a_step_is_by_the_gradient_uphill_of_certain_images() -> None:
    student, images = small_student(sharpness=4), batch(20)
    theta, limit = theta_of(student), 0.7 * math.log(K)
    chosen = entropies_by_batch(student, theta, images) < limit
    first = gradients(lambda t: entropies_by_batch(student, t, images)[chosen].mean(), theta, AFFINE)
    length = math.sqrt(sum(float((g**2).sum()) for g in first.values()))
    above = theta | {name: theta[name] + 0.3 * first[name] / length for name in AFFINE}
    still = chosen & (entropies_by_batch(student, above, images) < limit)
    second = gradients(lambda t: entropies_by_batch(student, t, images)[still].mean(), above, AFFINE)
    assert 0 < still.sum() < chosen.sum() < len(images)

    adapted = Sar(student, lr=0.1, steps=1, certain=0.7, radius=0.3, recovery=0.0).adapt(images)
    expected = theta | {name: theta[name] - 0.1 * second[name] for name in AFFINE}
    torch.testing.assert_close(theta_of(adapted), expected, rtol=1e-7, atol=1e-8)
    loss = entropies_by_batch(student, above, images)[still].mean()
    torch.testing.assert_close(adapted.average, loss.detach(), rtol=1e-7, atol=1e-9)


def test_the_moving_average_is_of_all_steps() -> None:
    student, batches = small_student(), [batch(), batch()]
    method = Sar(student, lr=0.1, certain=1.0, recovery=0.0)
    first = method.adapt(batches[0])
    second = method.adapt(batches[1], start=first)
    # With no average to go on from, the average of one step is its loss.
    alone = method.adapt(batches[1], start=first)
    first.average = None
    loss = method.adapt(batches[1], start=first).average
    torch.testing.assert_close(second.average, alone.average)
    torch.testing.assert_close(
        second.average, 0.9 * Sar(student, lr=0.1, certain=1.0, recovery=0.0).adapt(batches[0]).average + 0.1 * loss
    )


@pytest.mark.parametrize(("recovery", "recovered"), [(0.0, False), (5.0, True)])
def test_below_the_limit_everything_is_as_in_the_beginning(recovery: float, recovered: bool) -> None:
    student, images = small_student(), batch()
    adapted = Sar(student, lr=0.1, certain=1.0, recovery=recovery).adapt(images)
    assert all(torch.equal(theta_of(adapted)[name], value) for name, value in theta_of(student).items()) == recovered
    assert (adapted.average is None) == recovered
    assert (adapted.optimizer["state"] == {}) == recovered


def test_without_certain_images_no_step_is_taken() -> None:
    student, images = small_student(), batch()
    adapted = Sar(student, lr=0.1, certain=1e-6).adapt(images)
    assert all(torch.equal(theta_of(adapted)[name], value) for name, value in theta_of(student).items())
