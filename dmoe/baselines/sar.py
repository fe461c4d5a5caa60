"""SAR: entropy that stays low in a neighbourhood of the weights, of images that are certain enough.

Source: Niu et al., *Towards stable test-time adaptation in dynamic wild world*, ICLR 2023.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dmoe.baselines.descent import Descent, Stepped
from dmoe.baselines.shared import entropies, norm_parameters, require_classes
from dmoe.models.student import Student

NEWEST = 0.1
"""The share of a step in the moving average of the loss."""


def uphill(gradients: Sequence[Tensor], radius: float) -> list[Tensor]:
    """The step of length ``radius`` along all gradients together; eq. 4."""
    length = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    return [radius / (length + 1e-12) * gradient for gradient in gradients]


@contextmanager
def moved(parameters: Sequence[Tensor], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile, parameters lie elsewhere by ``offsets``; then where they were, to the bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, offset in zip(parameters, offsets, strict=True):
            parameter.add_(offset)
    yield
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


class Sar:
    """Steps of the affine parameters of normalisation, by the gradient that the entropy has a short way uphill.

    Images count whose entropy is below E0, both here and uphill. When the moving average of the loss falls below ``recovery``, all
    is as in the beginning: the source's weights, a fresh optimizer, no average. Published: SGD with momentum 0.9, batches of 64, a
    step each; radius 0.05, E0 = 0.4 ln K, recovery 0.2, for 1,000 classes; lr 0.00025 (ResNet) or 0.001 (ViT).
    """

    def __init__(
        self,
        student: Student,
        *,
        lr: float = 2.5e-4,
        steps: int = 1,
        certain: float = 0.4,
        radius: float = 0.05,
        recovery: float = 0.2,
    ) -> None:
        """
        Args:
            certain: E0 as a share of ln K.
            radius: how far uphill the gradient is taken.
            recovery: in nats.

        Raises:
            DoesNotApply: a regression, or a network without layers of normalisation.
        """
        require_classes("SAR", student.task)
        self._student, self._names = student, norm_parameters("SAR", student.features)
        self._lr, self._steps, self._certain, self._radius, self._recovery = lr, steps, certain, radius, recovery

    @torch.enable_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """With ``start``, the optimizer and the moving average go on too."""
        images = images.to(self._student.device)
        average = start.average if isinstance(start, Stepped) else None
        descent = self._from(start or self._student)
        for _ in range(self._steps):
            loss = self._step(descent, images)
            if loss is None:
                break
            average = loss if average is None else torch.lerp(average, loss, NEWEST)
            if average < self._recovery:
                descent, average = self._from(self._student), None
        return descent.student(images, average=average)

    def _from(self, student: Student) -> Descent:
        return Descent(student, self._names, lr=self._lr, optimizer="sgd")

    def _step(self, descent: Descent, images: Tensor) -> Tensor | None:
        """One step; the loss uphill, or None where no image is certain enough and no step is taken."""
        logits = descent.logits(images)
        here, limit = entropies(logits), self._certain * math.log(logits.shape[1])
        chosen = here < limit
        if not chosen.any():
            return None
        offsets = uphill(descent.gradients(here[chosen].mean()), self._radius)
        with moved(list(descent.parameters.values()), offsets):
            there = entropies(descent.logits(images))
            chosen = chosen & (there < limit)
            if not chosen.any():
                return None
            loss = there[chosen].mean()
            gradients = descent.gradients(loss)
        descent.step(gradients)
        return loss.detach()
