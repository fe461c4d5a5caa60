"""A small student in float64, and its forward pass written out."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.models.student import Student
from dmoe.tasks import Task, TaskKind

D, K = 6, 3
AFFINE = ["1.weight", "1.bias"]

Theta = Mapping[str, Tensor]


def small_student(kind: TaskKind = "multiclass", *, sharpness: float = 1.0) -> Student:
    """Convolution, batch-norm with statistics of its own, ReLU, linear; the head's weights grow with the sharpness."""
    features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, D)).double()
    norm = features[1]
    for tensor, low in ((norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5)):
        nn.init.uniform_(tensor, low, low + 1)
    outputs = K if kind == "multiclass" else 1
    head = nn.Linear(D, outputs).double()
    with torch.no_grad():
        head.weight.mul_(sharpness)
    return Student(features=features, head=head, task=Task(kind, outputs))


def normless_student() -> Student:
    features = nn.Sequential(nn.Flatten(), nn.Linear(72, D)).double()
    return Student(features=features, head=nn.Linear(D, K).double(), task=Task("multiclass", K))


def batch(count: int = 8) -> Tensor:
    return 1.5 * torch.randn(count, 2, 6, 6, dtype=torch.float64) + 0.5


def theta_of(student: Student) -> dict[str, Tensor]:
    """Copies of the feature parameters."""
    return {name: value.detach().clone() for name, value in student.parameters().items()}


def features_by_batch(theta: Theta, x: Tensor) -> Tensor:
    """What the features are where batch-norm goes by ``x`` itself."""
    x = F.conv2d(x, theta["0.weight"], theta["0.bias"])
    centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
    x = centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()
    x = (x * theta["1.weight"].view(-1, 1, 1) + theta["1.bias"].view(-1, 1, 1)).clamp(min=0)
    return x.flatten(1) @ theta["4.weight"].T + theta["4.bias"]


def probabilities_by_batch(student: Student, theta: Theta, x: Tensor) -> Tensor:
    """The same through the student's head, as probabilities ``[B, K]``."""
    logits = features_by_batch(theta, x) @ student.head.weight.T + student.head.bias
    return logits.exp() / logits.exp().sum(dim=1, keepdim=True)


def entropies_by_batch(student: Student, theta: Theta, x: Tensor) -> Tensor:
    p = probabilities_by_batch(student, theta, x)
    return -(p * p.log()).sum(dim=1)


def gradients(loss: Any, theta: Theta, names: list[str]) -> dict[str, Tensor]:
    """Of a function of theta, by central differences, entry by entry."""
    found = {}
    for name in names:
        gradient = torch.zeros_like(theta[name])
        for entry in range(gradient.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                moved = theta[name].clone()
                moved.view(-1)[entry] += step
                sides.append(float(loss({**theta, name: moved}).detach()))
            gradient.view(-1)[entry] = (sides[0] - sides[1]) / 2e-5
        found[name] = gradient
    return found


def state_of(student: Student) -> list[Any]:
    """All of a student that could be changed; tensors by value."""
    found: list[Any] = []
    for part in (student.features, student.head):
        found += [module.training for module in part.modules()]
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            found += [name, tensor.tolist(), tensor.requires_grad, tensor.grad is None]
    return found
