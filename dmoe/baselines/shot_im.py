"""SHOT-IM: features for which the source's head is certain about each image, and says every class equally often.

Source: Liang et al., *Do we really need to access the source data? Source hypothesis transfer for unsupervised domain adaptation*,
ICML 2020, eq. 2 and 3; without the pseudo-labels of the full method.
"""

import torch
from torch import Tensor

from dmoe.baselines.descent import Descent
from dmoe.baselines.shared import entropies, require_classes
from dmoe.models.student import Student


def uninformed(logits: Tensor) -> Tensor:
    """The loss: mean entropy of the predictions less the entropy of their mean, from logits ``[B, K]``."""
    log_mean = logits.log_softmax(dim=1).logsumexp(dim=0)  # of the mean, but for a constant that the next softmax takes away
    return entropies(logits).mean() - entropies(log_mean)


class ShotIm:
    """Steps of all feature parameters up the mutual information of support images and predictions; the head is frozen.

    Batch-norm goes by these images. Published: SGD with momentum 0.9, lr 0.001 for pretrained layers and 0.01 for new ones, 15
    epochs in batches of 64; the decay of weights (0.001) and of the learning rate are left out.
    """

    def __init__(self, student: Student, *, lr: float = 1e-3, steps: int = 15) -> None:
        """
        Raises:
            DoesNotApply: a regression.
        """
        require_classes("SHOT-IM", student.task)
        self._student, self._lr, self._steps = student, lr, steps

    @torch.enable_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """With ``start``, the optimizer goes on too."""
        images = images.to(self._student.device)
        descent = Descent(start or self._student, self._student.parameters(), lr=self._lr, optimizer="sgd")
        for _ in range(self._steps):
            descent.step(descent.gradients(uninformed(descent.logits(images))))
        return descent.student(images)
