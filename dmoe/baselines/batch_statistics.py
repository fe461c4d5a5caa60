"""Batch-norm statistics of the target domain in place of the source's, or mixed with them.

Source: Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, NeurIPS 2020; with
nothing of the source, Nado et al., 2020.
"""

import torch
from torch import Tensor

from dmoe.baselines.shared import with_statistics_of
from dmoe.models.student import Student


class BatchStatistics:
    """Every batch-norm layer takes mean and variance from the support images, and keeps them for all predictions.

    A network without such layers stays as it is. Published: N = 16 for single images, 0 to 1024 tried; at 64 images little
    depends on it.
    """

    def __init__(self, student: Student, *, source_weight: float = 0.0) -> None:
        """
        Args:
            source_weight: N, how many images the source's statistics count as; 0: as nothing.
        """
        self._student, self._source_weight = student, source_weight

    @torch.no_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """The statistics of ``start``, where there is one, take the place of the source's."""
        base = start or self._student
        features = with_statistics_of(images.to(base.device), base.features, source_weight=self._source_weight)
        return Student(features=features, head=base.head, task=base.task)
