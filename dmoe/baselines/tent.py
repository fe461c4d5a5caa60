"""TENT: certainty of the predictions, by the weights of the layers of normalisation.

Source: Wang et al., *Tent: fully test-time adaptation by entropy minimization*, ICLR 2021.
"""

import torch
from torch import Tensor

from dmoe.baselines.descent import Descent, Optimizer
from dmoe.baselines.shared import entropies, norm_parameters, require_classes
from dmoe.models.student import Student


class Tent:
    """Steps of the affine parameters down the mean entropy of the support images, batch-norm going by these images.

    Published: a step a batch; Adam, lr 0.001, batches of 200 (CIFAR-C); SGD with momentum 0.9, lr 0.00025, batches of 64
    (ImageNet-C).
    """

    def __init__(self, student: Student, *, lr: float = 1e-3, steps: int = 1, optimizer: Optimizer = "adam") -> None:
        """
        Raises:
            DoesNotApply: a regression, or a network without layers of normalisation.
        """
        require_classes("TENT", student.task)
        self._student, self._names = student, norm_parameters("TENT", student.features)
        self._lr, self._steps, self._optimizer = lr, steps, optimizer

    @torch.enable_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """With ``start``, the optimizer goes on too."""
        images = images.to(self._student.device)
        descent = Descent(start or self._student, self._names, lr=self._lr, optimizer=self._optimizer)
        for _ in range(self._steps):
            descent.step(descent.gradients(entropies(descent.logits(images)).mean()))
        return descent.student(images)
