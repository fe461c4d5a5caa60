"""The loss of the domains that are worst off."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.objectives.base import Objective, Outputs
from dmoe.tasks import Task


class GroupDRO(nn.Module, Objective):
    """The domains' losses, weighted; the weight of a domain grows exponentially with its losses so far.

    Source: Sagawa et al., *Distributionally robust neural networks for group shifts*, ICLR 2020, algorithm 1, with all domains of a
    batch at once as Gulrajani & Lopez-Paz, ICLR 2021. Where a batch has some of the domains only, their sum is scaled up to all.
    """

    weights: Tensor

    def __init__(self, task: Task, *, domains: Sequence[int], weights_lr: float) -> None:
        """
        Args:
            domains: numbers of all domains that will come.
            weights_lr: what losses are multiplied by in the exponent (DomainBed: 0.01, or 0.001 to 0.1).
        """
        super().__init__()
        self._task, self._weights_lr = task, weights_lr
        self._place = {domain: place for place, domain in enumerate(sorted(domains))}
        self.register_buffer("weights", torch.full((len(domains),), 1 / len(domains)))

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        parts = list(batch.by_domain())
        places = [self._place[int(part.domains[0])] for part in parts]
        losses = torch.stack([self._task.loss(part.logits, part.labels) for part in parts])
        with torch.no_grad():
            self.weights[places] *= (self._weights_lr * losses).exp()
            self.weights /= self.weights.sum()
        return len(self.weights) / len(places) * (self.weights[places] * losses).sum()
