"""LAME: the predictions of a batch corrected together, so that images with like features are said to be of one class.

Source: Boudiaf et al., *Parameter-free online test-time adaptation*, CVPR 2022.
Notation: n images, K classes (2 for a binary task).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.baselines.shared import class_logits, require_classes, task_logits
from dmoe.models.student import Student

Affinity = Literal["knn", "rbf"]
"""knn: 1 to the nearest others, made symmetric. rbf: a Gaussian as wide as the mean distance to the last of the nearest."""

STEPS, SETTLED = 100, 1e-6
"""At most so many updates; they end when no probability changes by more."""


def affinities(features: Tensor, *, kind: Affinity, neighbours: int) -> Tensor:
    """How alike the directions of features ``[n, D]`` are, ``[n, n]``, symmetric."""
    directions = F.normalize(features, dim=1)
    squared = (2 - 2 * directions @ directions.T).clamp_min(0).fill_diagonal_(torch.inf)
    nearest = squared.topk(min(neighbours, len(features) - 1), dim=1, largest=False)
    if kind == "knn":
        chosen = torch.zeros_like(squared).scatter_(1, nearest.indices, 1)
        return (chosen + chosen.T) / 2
    if nearest.values.numel() == 0:
        return torch.ones_like(squared)
    width = nearest.values[:, -1].sqrt().mean().clamp_min(1e-6)  # images may be equal
    return (squared.fill_diagonal_(0) / (-2 * width.square())).exp()


def adjusted(logits: Tensor, affinity: Tensor) -> Tensor:
    """Log-probabilities ``[n, K]`` that lie near the softmax of ``logits`` and are alike where ``affinity`` ``[n, n]`` is high.

    What falls is the sum over images of KL(z_i || q_i) less half the sum over pairs of w_ij z_i z_j. Each update minimises it with
    the second term made linear at the last z: z_i ~ q_i exp(sum_j w_ij z_j). It never rises where the affinity has no negative
    eigenvalues, as ``rbf``; of ``knn`` that is no theorem.
    """
    predicted = found = logits.log_softmax(dim=1)
    for _ in range(STEPS):
        before, found = found, (predicted + affinity @ found.exp()).log_softmax(dim=1)
        if (found.exp() - before.exp()).abs().max() <= SETTLED:
            break
    return found


class Adjusted(Student):
    """A student whose logits depend on what images come together."""

    def __init__(self, student: Student, *, together: int, kind: Affinity, neighbours: int) -> None:
        super().__init__(features=student.features, head=student.head, task=student.task)
        self._together, self._kind, self._neighbours = together, kind, neighbours

    @torch.no_grad()
    def logits(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Logits ``[B, K]``, corrected in groups of as many images as the support had, in their order."""
        features = torch.cat([self.features(part.to(self.device)) for part in images.split(batch_size)])
        return torch.cat([self._corrected(group) for group in features.split(self._together)])

    def _corrected(self, features: Tensor) -> Tensor:
        affinity = affinities(features, kind=self._kind, neighbours=self._neighbours)
        return task_logits(adjusted(class_logits(self.head(features), self.task), affinity), self.task)


class Lame:
    """Nothing is learned: of the support, only its size counts. Published: 5 nearest neighbours; also rbf."""

    def __init__(self, student: Student, *, affinity: Affinity = "knn", neighbours: int = 5) -> None:
        """
        Raises:
            DoesNotApply: a regression.
        """
        require_classes("LAME", student.task)
        self._student, self._affinity, self._neighbours = student, affinity, neighbours

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """Nothing is remembered, so ``start`` changes nothing."""
        return Adjusted(self._student, together=len(images), kind=self._affinity, neighbours=self._neighbours)
