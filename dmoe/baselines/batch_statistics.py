"""Batch-norm statistics of the target domain in place of the source's.

Source: Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, NeurIPS 2020, with
nothing mixed in from the source; Nado et al., 2020.
"""

import copy

import torch
from torch import Tensor, nn

from dmoe.models.student import Student


class BatchStatistics:
    """Every batch-norm layer takes mean and variance from the support images, and keeps them for all predictions."""

    def __init__(self, student: Student) -> None:
        self._student = student

    @torch.no_grad()
    def adapt(self, images: Tensor) -> Student:
        features = copy.deepcopy(self._student.features)
        for module in features.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
                module.momentum = 1.0  # the running statistics become those of this batch
        features(images.to(self._student.device))
        return Student(features=features, head=self._student.head, task=self._student.task)
