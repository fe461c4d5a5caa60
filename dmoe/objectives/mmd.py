"""Features that kernels cannot tell the domain from."""

import torch
from torch import Tensor

from dmoe.objectives.base import Objective, Outputs, mean_over_pairs
from dmoe.tasks import Task

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Of the Gaussian kernels exp(-gamma |x - y|^2), which are added up, as in DomainBed."""


class MMD(Objective):
    """The task loss, and how far the distributions of the features are apart between domains, as kernels see it.

    Source: Li et al., *Domain generalization with adversarial feature learning*, CVPR 2018; on the features themselves,
    without the autoencoder and the adversary there, as Gulrajani & Lopez-Paz, *In search of lost domain generalization*, ICLR 2021.
    """

    def __init__(self, task: Task, *, penalty: float) -> None:
        """
        Args:
            penalty: weight of the distance (DomainBed: 1, or 0.1 to 10).
        """
        self._task, self._penalty = task, penalty

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        return self._task.loss(batch.logits, batch.labels) + self._penalty * mmd_penalty(batch)


def mmd_penalty(batch: Outputs) -> Tensor:
    """Squared maximum mean discrepancy of the features, averaged over pairs of domains."""
    parts = [part.features for part in batch.by_domain()]
    return mean_over_pairs(parts, squared_mmd, none=batch.features.new_zeros(()))


def squared_mmd(one: Tensor, other: Tensor) -> Tensor:
    """Squared distance of the mean embeddings of samples ``[B, D]`` and ``[B', D]``; never negative."""
    return _kernel(one, one).mean() + _kernel(other, other).mean() - 2 * _kernel(one, other).mean()


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """The sum of the kernels of each of B with each of B', ``[B, B']``."""
    squares = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * one @ other.T
    distances = squares.clamp(min=0)  # rounding
    return torch.stack([(-gamma * distances).exp() for gamma in GAMMAS]).sum(dim=0)
