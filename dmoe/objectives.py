"""What supervised training on several source domains minimises: a loss of the features and logits of a batch, and of its domains.

Notation: B images of E domains in a batch, D features, K outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.tasks import Task


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes:
        features: ``[B, D]``.
        logits: ``[B, K]``.
        labels: ``[B]``.
        domains: the source domain of each image, ``[B]``.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    domains: Tensor

    def by_domain(self) -> "Iterator[Outputs]":
        """The part of each domain, in the order of their numbers."""
        for domain in self.domains.unique():
            chosen = self.domains == domain
            yield Outputs(*(part[chosen] for part in self))


class Objective(ABC):
    """A loss to train by. One with weights or state of its own is an ``nn.Module`` too: they are trained and kept with the network.

    Attributes:
        restart_at: the step before which the optimizer forgets its moments, where the loss changes its scale there; None: never.
    """

    restart_at: int | None = None

    @abstractmethod
    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        """A scalar."""


class ERM(Objective):
    """Empirical risk minimisation: the task loss, whatever the domains. Source: Vapnik, *Statistical Learning Theory*, 1998."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        return self._task.loss(batch.logits, batch.labels)


class CORAL(Objective):
    """The task loss, and how far means and covariances of the features differ between domains.

    Source: Sun & Saenko, *Deep CORAL*, ECCV 2016, eq. 1; between all pairs of source domains, and with means, as Gulrajani &
    Lopez-Paz, *In search of lost domain generalization*, ICLR 2021.
    """

    def __init__(self, task: Task, *, penalty: float) -> None:
        """
        Args:
            penalty: weight of the differences (DomainBed: 1, or 0.1 to 10).
        """
        self._task, self._penalty = task, penalty

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        return self._task.loss(batch.logits, batch.labels) + self._penalty * coral_penalty(batch)


class IRM(Objective):
    """The task loss, and how much each domain would gain by a scale of its own for the logits.

    Source: Arjovsky et al., *Invariant risk minimization*, 2019, IRMv1, eq. 4; the schedule of the weight as Gulrajani &
    Lopez-Paz, ICLR 2021.
    """

    def __init__(self, task: Task, *, penalty: float, anneal_steps: int) -> None:
        """
        Args:
            penalty: weight of the gain (DomainBed: 100, or 0.1 to 100,000) once ``anneal_steps`` steps are done; 1 until then.
            anneal_steps: DomainBed: 500, or 1 to 10,000.
        """
        self._task, self._penalty, self.restart_at = task, penalty, anneal_steps

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        weight = self._penalty if self.restart_at is None or step >= self.restart_at else 1.0
        return self._task.loss(batch.logits, batch.labels) + weight * irm_penalty(self._task, batch)


def coral_penalty(batch: Outputs) -> Tensor:
    """Squared differences of means, averaged over D, and of covariances, averaged over D x D; averaged over pairs of domains."""
    moments = [_moments(part.features) for part in batch.by_domain()]
    pairs = [
        (mean - other_mean).square().mean() + (covariance - other_covariance).square().mean()
        for (mean, covariance), (other_mean, other_covariance) in combinations(moments, 2)
    ]
    return torch.stack(pairs).mean() if pairs else batch.features.new_zeros(())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and covariance ``[D, D]``; that of a single image is zero."""
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / max(1, len(features) - 1)


def irm_penalty(task: Task, batch: Outputs) -> Tensor:
    """The squared gradient of a domain's risk by a scale of the logits, at 1, averaged over domains.

    The square is the product of the gradients of every other image and of the rest, whose expectation it is.
    """
    gains = [_gain(task, part, slice(0, None, 2)) * _gain(task, part, slice(1, None, 2)) for part in batch.by_domain()]
    return torch.stack(gains).mean()


def _gain(task: Task, batch: Outputs, chosen: slice) -> Tensor:
    """The gradient of the risk of the chosen images by a scale of their logits, at 1; zero where there are none."""
    logits, labels = batch.logits[chosen], batch.labels[chosen]
    if len(labels) == 0:
        return batch.logits.new_zeros(())
    scale = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(task.loss(scale * logits, labels), scale, create_graph=True)
    return gradient
