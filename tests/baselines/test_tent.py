"""TENT: its steps, and what they leave alone."""

import torch
from small_student import AFFINE, batch, entropies_by_batch, gradients, probabilities_by_batch, small_student, theta_of

from dmoe.baselines.shared import entropies
from dmoe.baselines.tent import Tent


def test_a_step_is_one_down_the_mean_entropy_by_finite_differences() -> None:
    student, images = small_student(), batch()
    theta = theta_of(student)
    gradient = gradients(lambda t: entropies_by_batch(student, t, images).mean(), theta, AFFINE)
    found = theta_of(Tent(student, lr=0.3, steps=1, optimizer="sgd").adapt(images))
    for name, value in theta.items():
        expected = value - 0.3 * gradient[name] if name in AFFINE else value
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-9)
        assert torch.equal(found[name], value) == (name not in AFFINE)


def test_the_first_step_of_adam_is_as_long_for_every_parameter() -> None:
    student, images = small_student(), batch()
    theta = theta_of(student)
    gradient = gradients(lambda t: entropies_by_batch(student, t, images).mean(), theta, AFFINE)
    found = theta_of(Tent(student, lr=0.01, steps=1).adapt(images))
    for name in AFFINE:
        torch.testing.assert_close(found[name], theta[name] - 0.01 * gradient[name].sign(), rtol=1e-5, atol=1e-7)


def test_momentum_goes_on_from_batch_to_batch() -> None:
    student, batches = small_student(), [batch(), batch(), batch()]
    method = Tent(student, lr=0.2, steps=1, optimizer="sgd")
    theta, velocity, start = theta_of(student), dict.fromkeys(AFFINE, torch.zeros(4, dtype=torch.float64)), None
    for images in batches:
        gradient = gradients(lambda t, x=images: entropies_by_batch(student, t, x).mean(), theta, AFFINE)
        velocity = {name: 0.9 * velocity[name] + gradient[name] for name in AFFINE}
        theta |= {name: theta[name] - 0.2 * velocity[name] for name in AFFINE}
        start = method.adapt(images, start=start)
    torch.testing.assert_close(theta_of(start), theta, rtol=1e-7, atol=1e-8)


def test_several_steps_are_as_many_calls_on_the_same_images() -> None:
    student, images = small_student(), batch()
    start = None
    for _ in range(4):
        start = Tent(student, lr=0.01, steps=1).adapt(images, start=start)
    assert torch.equal(Tent(student, lr=0.01, steps=4).adapt(images).logits(images), start.logits(images))


def test_predictions_go_by_the_statistics_of_the_support() -> None:
    student, images = small_student(), batch()
    adapted = Tent(student, lr=0.01, steps=5).adapt(images)
    expected = probabilities_by_batch(student, theta_of(adapted), images)
    torch.testing.assert_close(adapted.predict(images), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapted.predict(images[:1]), expected[:1], rtol=1e-10, atol=1e-12)


def test_entropy_falls() -> None:
    student, images = small_student(), batch()
    levels = [entropies(Tent(student, lr=0.01, steps=n).adapt(images).logits(images)).mean() for n in (0, 5, 20)]
    assert levels[0] > levels[1] > levels[2]
