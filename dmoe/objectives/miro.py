"""Features from which those of the pretrained network can still be told."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.objectives.base import Objective, Outputs
from dmoe.tasks import Task

FIRST_VARIANCE, LEAST_VARIANCE = 0.1, 1e-5

ENCODER_SPEED = 10.0
"""The variances learn so many times as fast as the network, as in the public code: Adam's steps know no scale."""


class MIRO(nn.Module, Objective):
    """The task loss, and how unlikely the pretrained network's features are, as a Gaussian around the network's own.

    Source: Cha et al., *Domain generalization by mutual-information regularization with pre-trained models*, ECCV 2022: the mean
    is the features themselves, the variance of each feature is learned. There several layers are compared; here it is the last one,
    which all backbones have.
    """

    def __init__(self, task: Task, *, features: nn.Module, width: int, penalty: float) -> None:
        """
        Args:
            features: the network's, as training begins with them; they are copied.
            width: D.
            penalty: weight of the negative log-likelihood (the paper: 0.1, or 0.001 to 1).
        """
        super().__init__()
        self._task, self._penalty = task, penalty
        self.pretrained = copy.deepcopy(features).eval().requires_grad_(False)
        first = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE)) / ENCODER_SPEED
        self.encoder = nn.Parameter(torch.full((width,), first))

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        assert batch.images is not None
        with torch.no_grad():
            pretrained = self.pretrained(batch.images)
        variance = F.softplus(ENCODER_SPEED * self.encoder) + LEAST_VARIANCE
        return self._task.loss(batch.logits, batch.labels) + self._penalty * unlikelihood(pretrained, batch.features, variance)


def unlikelihood(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Negative log-likelihood of ``[B, D]`` under Gaussians of variances ``[D]``, up to a constant; averaged over B and D."""
    return ((values - mean).square() / variance + variance.log()).mean() / 2
