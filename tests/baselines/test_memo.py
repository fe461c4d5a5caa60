"""MEMO: its augmentations, and its steps beside those of a plain loop."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from small_student import batch, small_student
from torch import nn

from dmoe.baselines import memo
from dmoe.baselines.memo import Memo, augmented, marginal_entropy, random_movements


def movement(*, turn: float = 0.0, zoom: float = 0.0, right: float = 0.0, down: float = 0.0) -> torch.Tensor:
    return torch.tensor([[turn, zoom, right, down]], dtype=torch.float64)


def test_no_movement_leaves_every_image_as_it_is() -> None:
    images = batch(3)
    torch.testing.assert_close(augmented(images, movement())[:, 0], images)


def test_shifts_are_shares_of_the_image_and_repeat_its_edge() -> None:
    images = batch(3)  # 6 pixels wide
    found = augmented(images, movement(right=1 / 6, down=2 / 6))[:, 0]
    torch.testing.assert_close(found[..., :4, :5], images[..., 2:, 1:])
    torch.testing.assert_close(found[..., 5, 5], images[..., 5, 5])


@pytest.mark.parametrize("shape", [(6, 6), (7, 3)])
def test_turns_are_turns_in_pixels(shape: tuple[int, int]) -> None:
    images = torch.randn(2, 1, *shape, dtype=torch.float64)
    found = augmented(images, movement(turn=np.pi))[:, 0]
    torch.testing.assert_close(found, images.flip((2, 3)))
    if shape[0] == shape[1]:
        torch.testing.assert_close(augmented(images, movement(turn=np.pi / 2))[:, 0], images.rot90(1, (2, 3)))
    else:  # a quarter turn about the middle: the middle column of pixels becomes a row
        found = augmented(images, movement(turn=np.pi / 2))[:, 0]
        torch.testing.assert_close(found[:, :, 3], images[:, :, 2:5, 1])


def test_a_plain_image_stays_plain_whatever_the_movement() -> None:
    images = torch.full((2, 5, 9, 4), -3.5)
    torch.testing.assert_close(augmented(images, random_movements(20, seed=1)), images[:, None].expand(-1, 20, -1, -1, -1))


def test_movements_are_small_and_a_function_of_the_seed() -> None:
    found = random_movements(1000, seed=3)
    bounds = torch.tensor([memo.TURN, memo.SCALE, memo.SHIFT, memo.SHIFT])
    assert (found.abs() <= bounds).all() and (found.abs().amax(dim=0) > 0.95 * bounds).all()
    assert torch.equal(found, random_movements(1000, seed=3))
    assert not torch.equal(found, random_movements(1000, seed=4))


def test_the_loss_is_the_entropy_of_the_mean() -> None:
    logits = 2 * torch.randn(7, 4, dtype=torch.float64)
    assert float(marginal_entropy(logits)) == pytest.approx(entropy(logits.softmax(dim=1).numpy().mean(axis=0)), rel=1e-12)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
@pytest.mark.parametrize("steps", [1, 3])
def test_images_together_are_predicted_as_by_a_loop_over_them(kind: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "AT_ONCE", 3)
    student, images = small_student(kind), batch(7)
    found = Memo(student, lr=0.2, steps=steps, augmentations=5, seed=2).adapt(batch()).logits(images)
    movements = random_movements(5, seed=2)
    for image, logits in zip(images, found, strict=True):
        network = nn.Sequential(copy.deepcopy(student.features), copy.deepcopy(student.head)).requires_grad_()
        sgd = torch.optim.SGD(network.parameters(), lr=0.2)
        for _ in range(steps):
            said = student.task.probabilities(network(augmented(image[None], movements)[0])).mean(dim=0)
            sgd.zero_grad()
            (-(said * said.log()).sum()).backward()
            sgd.step()
        torch.testing.assert_close(logits, network(image[None])[0].detach(), rtol=1e-9, atol=1e-11)
        assert (logits - student.logits(image[None])[0]).abs().max() > 1e-3


def test_large_networks_are_taken_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    student, images = small_student(), batch(5)
    expected = Memo(student).adapt(images).logits(images)
    monkeypatch.setattr(memo, "WEIGHTS_AT_ONCE", 1)
    torch.testing.assert_close(Memo(student).adapt(images).logits(images), expected)
