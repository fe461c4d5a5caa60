"""EATA: entropy of the images that are worth it, and weights that stay near where the source's images need them.

Source: Niu et al., *Efficient test-time model adaptation without forgetting*, ICML 2022.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dmoe.baselines.descent import Descent, Stepped
from dmoe.baselines.shared import class_logits, entropies, norm_parameters, require_classes
from dmoe.models.copying import private_copy
from dmoe.models.student import Student

NEWEST = 0.1
"""The share of a batch in the moving average of predictions."""

AT_ONCE = 50
"""Source images whose gradients are in memory together."""


def worth(logits: Tensor, average: Tensor | None, *, certain: float, redundant: float) -> Tensor:
    """How much each image counts, ``[B]``, from logits ``[B, K]``; 0 for those that are left out.

    exp(E0 - E) where the entropy E is below E0 = ``certain`` ln K, and the prediction is not like the ``average`` ``[K]`` one
    (cosine below ``redundant``); eq. 3 to 6.
    """
    entropy, limit = entropies(logits), certain * math.log(logits.shape[1])
    chosen = entropy < limit
    if average is not None:
        chosen = chosen & (F.cosine_similarity(logits.softmax(dim=1), average[None], dim=1) < redundant)
    return (limit - entropy).exp() * chosen


def fisher(student: Student, names: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """The mean over ``images`` of the squared gradient of each parameter, of the cross-entropy to what the student says; eq. 9.

    Batch-norm goes by its running statistics, so that every image has a gradient of its own.
    """
    features = private_copy(student.features)
    theta = {name: features.get_parameter(name).detach() for name in names}

    def surprise(theta: Mapping[str, Tensor], image: Tensor) -> Tensor:
        logits = class_logits(student.head(functional_call(features, dict(theta), (image[None],))), student.task)
        return -logits.log_softmax(dim=1).amax()

    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    for part in images.split(AT_ONCE):
        for name, gradients in vmap(grad(surprise), in_dims=(None, 0))(theta, part.to(student.device)).items():
            total[name] += gradients.square().sum(dim=0)
    return {name: value / len(images) for name, value in total.items()}


class Eata:
    """Steps of the affine parameters of normalisation down the weighted entropy, held back by the Fisher information of the source.

    The moving average of predictions is of batches before; the images of one batch are compared with it in all steps, and enter it
    afterwards. A step for which no image is left is not taken. Published: SGD with momentum 0.9 in batches of 64, a step each,
    E0 = 0.4 ln K, 2,000 images for the Fisher information; lr 0.005, cosine 0.4, Fisher weight 1 (CIFAR-10-C); lr 0.00025, cosine
    0.05, Fisher weight 2,000 (ImageNet-C).
    """

    def __init__(
        self,
        student: Student,
        *,
        source: Tensor,
        lr: float = 5e-3,
        steps: int = 1,
        certain: float = 0.4,
        redundant: float = 0.4,
        fisher_weight: float = 1.0,
    ) -> None:
        """
        Args:
            source: images of source domains, ``[n, C, H, W]``; no labels are needed.
            certain: E0 as a share of ln K.
            redundant: the cosine from which on an image tells nothing new.
            fisher_weight: of the penalty.

        Raises:
            DoesNotApply: a regression, or a network without layers of normalisation.
        """
        require_classes("EATA", student.task)
        self._student, self._names = student, norm_parameters("EATA", student.features)
        self._lr, self._steps, self._certain, self._redundant = lr, steps, certain, redundant
        self._fisher, self._fisher_weight = fisher(student, self._names, source), fisher_weight

    @torch.enable_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """With ``start``, the optimizer and the moving average go on too."""
        images = images.to(self._student.device)
        average = start.average if isinstance(start, Stepped) else None
        descent = Descent(start or self._student, self._names, lr=self._lr, optimizer="sgd")
        chosen = images.new_zeros(0)
        for _ in range(self._steps):
            logits = descent.logits(images)
            weights = worth(logits.detach(), average, certain=self._certain, redundant=self._redundant)
            count = weights.count_nonzero()
            if count == 0:
                break
            chosen = logits.detach().softmax(dim=1)[weights > 0]
            loss = (weights * entropies(logits)).sum() / count + self._fisher_weight * self._drift(descent.parameters)
            descent.step(descent.gradients(loss))
        return descent.student(images, average=_moved(average, chosen))

    def _drift(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """How far parameters have gone from the source's, weighted by their Fisher information; eq. 8."""
        source = self._student.parameters()
        parts = [(self._fisher[name] * (value - source[name].detach()).square()).sum() for name, value in parameters.items()]
        return torch.stack(parts).sum()


def _moved(average: Tensor | None, predictions: Tensor) -> Tensor | None:
    """The moving average with the predictions ``[m, K]`` of one more batch; of none, as it was."""
    if len(predictions) == 0:
        return average
    mean = predictions.mean(dim=0)
    return mean if average is None else torch.lerp(average, mean, NEWEST)
