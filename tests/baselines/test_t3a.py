"""T3A: its prototypes by numpy, image by image."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from small_student import D, K, batch, small_student
from torch import Tensor, nn

from dmoe.baselines.t3a import T3a
from dmoe.errors import UserError
from dmoe.models.student import Student
from dmoe.tasks import Task


def prototypes_by_hand(weight: np.ndarray, bias: np.ndarray, features: np.ndarray, kept: int) -> np.ndarray:
    supports: list[list[tuple[float, np.ndarray]]] = [[] for _ in weight]
    for number, row in enumerate(weight):
        supports[number].append((entropy(softmax(weight @ row + bias)), row / np.linalg.norm(row)))
    for z in features:
        p = softmax(weight @ z + bias)
        supports[int(np.argmax(p))].append((entropy(p), z / np.linalg.norm(z)))
    found = []
    for of_class in supports:
        mean = np.mean([z for _, z in sorted(of_class, key=lambda support: support[0])[:kept]], axis=0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def parts_of(student: Student) -> tuple[np.ndarray, np.ndarray]:
    return student.head.weight.detach().numpy(), student.head.bias.detach().numpy()


def features_of(student: Student, images: Tensor) -> np.ndarray:
    return student.features(images).detach().numpy()


@pytest.mark.parametrize("kept", [1, 3, 1000])
def test_prototypes_are_means_of_the_most_certain_supports(kept: int) -> None:
    student, images, other = small_student(), batch(30), batch()
    adapted = T3a(student, supports_per_class=kept).adapt(images)
    expected = prototypes_by_hand(*parts_of(student), features_of(student, images), kept)
    np.testing.assert_allclose(adapted.head.weight.detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(adapted.logits(other), features_of(student, other) @ expected.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", [2, 1000])
def test_going_on_adds_to_the_supports(kept: int) -> None:
    student, batches = small_student(), [batch(10), batch(10), batch(10)]
    method, start = T3a(student, supports_per_class=kept), None
    for images in batches:
        start = method.adapt(images, start=start)
    together = method.adapt(torch.cat(batches))
    torch.testing.assert_close(start.head.weight, together.head.weight, rtol=1e-11, atol=1e-13)


def test_a_binary_head_is_the_difference_of_two_prototypes() -> None:
    student, images = small_student("binary"), batch(30)
    adapted = T3a(student, supports_per_class=4).adapt(images)
    weight, bias = parts_of(student)
    # Classes by the one logit; entropies are of (0, logit).
    supports: dict[int, list[tuple[float, np.ndarray]]] = {0: [], 1: []}
    for sign, row in ((0, -weight[0]), (1, weight[0])):
        supports[sign].append((entropy(softmax([0, weight[0] @ row + bias[0]])), row / np.linalg.norm(row)))
    for z in features_of(student, images):
        logit = weight[0] @ z + bias[0]
        supports[int(logit > 0)].append((entropy(softmax([0, logit])), z / np.linalg.norm(z)))
    means = [np.mean([z for _, z in sorted(supports[c], key=lambda s: s[0])[:4]], axis=0) for c in (0, 1)]
    negative, positive = (mean / np.linalg.norm(mean) for mean in means)
    np.testing.assert_allclose(adapted.head.weight.detach()[0], positive - negative, rtol=1e-10, atol=1e-12)


def test_a_class_that_no_image_is_of_keeps_its_row() -> None:
    student = small_student()
    with torch.no_grad():
        student.head.bias[2] -= 1000
    adapted = T3a(student).adapt(batch())
    torch.testing.assert_close(adapted.head.weight[2], nn.functional.normalize(student.head.weight[2].detach(), dim=0))


def test_a_head_that_is_not_linear_is_refused() -> None:
    head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, K)).double()
    student = Student(features=small_student().features, head=head, task=Task("multiclass", K))
    with pytest.raises(UserError, match=r"^T3A: replaces a linear head; this one is a Sequential: "):
        T3a(student)
