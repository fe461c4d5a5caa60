"""T3A: a new linear head, of prototypes that the confident images of the domain help to make.

Source: Iwasawa & Matsuo, *Test-time classifier adjustment module for model-agnostic domain generalization*, NeurIPS 2021.
Notation: B images, D feature width, K classes (2 for a binary task).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.baselines.shared import class_logits, entropies, require_classes, task_logits
from dmoe.errors import DoesNotApply
from dmoe.models.student import Student


class Supports(NamedTuple):
    """What prototypes are made of: n features of length 1 ``[n, D]``, how uncertain their predictions are, and for which class."""

    features: Tensor
    entropies: Tensor
    classes: Tensor

    def with_more(self, others: "Supports") -> "Supports":
        return Supports(*(torch.cat(pair) for pair in zip(self, others, strict=True)))

    def most_certain(self, count: int) -> "Supports":
        """Of each class the ``count`` of the lowest entropy; of equal ones the first."""
        order = self.entropies.argsort(stable=True)
        ordered = Supports(*(part[order] for part in self))
        ranks = F.one_hot(ordered.classes).cumsum(dim=0).gather(1, ordered.classes[:, None]).squeeze(1)
        return Supports(*(part[ranks <= count] for part in ordered))

    def prototypes(self, num_classes: int) -> Tensor:
        """The mean of each class, as a vector of length 1, ``[K, D]``."""
        sums = self.features.new_zeros(num_classes, self.features.shape[1]).index_add_(0, self.classes, self.features)
        return F.normalize(sums, dim=1)


class Prototyped(Student):
    """A student that remembers what its head is made of."""

    def __init__(self, student: Student, supports: Supports, num_classes: int) -> None:
        rows = task_logits(supports.prototypes(num_classes).T, student.task).T  # the logits of a linear map are linear in its rows
        head = nn.Linear(rows.shape[1], len(rows), bias=False, device=rows.device, dtype=rows.dtype).requires_grad_(False)
        head.weight.copy_(rows)
        super().__init__(features=student.features, head=head, task=student.task)
        self.supports = supports


class T3a:
    """Each class has supports: its row of the source's head, and the features of images that this head says to be of that class.

    Kept are the most certain; the logit is the product of a feature and the class's prototype. As in the public code, a prototype
    has length 1, so that no class is favoured for supports that lie close together. Published: M chosen of 1, 5, 20, 50, 100, all.
    """

    def __init__(self, student: Student, *, supports_per_class: int = 20) -> None:
        """
        Args:
            supports_per_class: M, how many are kept of each class.

        Raises:
            DoesNotApply: a regression, or a head that is not one linear layer.
        """
        require_classes("T3A", student.task)
        if not isinstance(student.head, nn.Linear):
            raise DoesNotApply(f"T3A: replaces a linear head; this one is a {type(student.head).__name__}: leave this method out")
        self._student, self._kept = student, supports_per_class
        weight = student.head.weight.detach()
        rows = torch.cat([-weight, weight]) if student.task.kind == "binary" else weight
        self._num_classes = len(rows)
        self._rows = self._supports(rows)._replace(classes=torch.arange(len(rows), device=rows.device))

    @torch.no_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """With ``start``, its supports are kept beside the new ones, as far as they are among the most certain."""
        known = start.supports if isinstance(start, Prototyped) else self._rows
        found = self._supports(self._student.features(images.to(self._student.device)))
        return Prototyped(self._student, known.with_more(found).most_certain(self._kept), self._num_classes)

    @torch.no_grad()
    def _supports(self, features: Tensor) -> Supports:
        logits = class_logits(self._student.head(features), self._student.task)
        return Supports(F.normalize(features, dim=1), entropies(logits), logits.argmax(dim=1))
