"""Features that a classifier, which learns against them, cannot tell the domain from."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.objectives.base import Objective, Outputs
from dmoe.tasks import Task


class DANN(nn.Module, Objective):
    """The task loss, and that of a classifier of domains, whose gradient is reversed where it enters the features.

    Source: Ganin et al., *Domain-adversarial training of neural networks*, JMLR 2016, with its schedule; among source domains, by a
    classifier of the shape that Gulrajani & Lopez-Paz, ICLR 2021, use. Both sides take each step together, by one optimizer, where
    the latter take turns. With Adam's momentum the two can circle round one another, which plain descent, the paper's, does not
    on the small problem of the tests.
    """

    known: Tensor

    def __init__(self, task: Task, *, features: int, domains: Sequence[int], penalty: float, ramp_steps: int, width: int) -> None:
        """
        Args:
            features: D.
            domains: numbers of all domains that will come.
            penalty: weight of the reversed gradient at its highest (DomainBed: 1, or 0.01 to 100).
            ramp_steps: in which it rises to that from 0 (the paper: the whole training; DomainBed: 0).
            width: of the two hidden layers.
        """
        super().__init__()
        self._task, self._penalty, self._ramp_steps = task, penalty, ramp_steps
        self.register_buffer("known", torch.tensor(sorted(domains)), persistent=False)
        self.classifier = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(domains))
        )

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        told: Tensor = self.classifier(reversed_gradient(batch.features, weight=self.weight(step)))
        domains = torch.searchsorted(self.known, batch.domains)
        return self._task.loss(batch.logits, batch.labels) + F.cross_entropy(told, domains)

    def weight(self, step: int) -> float:
        """Of the reversed gradient in a step: penalty x (2 / (1 + exp(-10 p)) - 1), where p is how much of the ramp is done."""
        return self._penalty if step >= self._ramp_steps else self._penalty * math.tanh(5 * step / self._ramp_steps)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


def reversed_gradient(value: Tensor, *, weight: float) -> Tensor:
    """The value itself, whose gradient comes back times ``-weight``."""
    found: Tensor = _Reversed.apply(value, weight)
    return found
