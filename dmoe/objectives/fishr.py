"""Gradients of the head that scatter alike in all domains."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.objectives.base import Objective, Outputs
from dmoe.tasks import Task


class Fishr(nn.Module, Objective):
    """The task loss, and how far the variances of the head's gradients by single images differ between domains.

    Source: Rame et al., *Fishr: Invariant gradient variances for out-of-distribution generalization*, ICML 2022, with
    moving averages of the variances; these are divided by 1 - ema, as in DomainBed, which the usual penalties are for.
    """

    variances: Tensor

    def __init__(
        self, task: Task, *, head: nn.Linear, domains: Sequence[int], penalty: float, anneal_steps: int, ema: float
    ) -> None:
        """
        Args:
            domains: numbers of all domains that will come.
            penalty: weight of the differences (DomainBed: 1,000, or 10 to 10,000) once ``anneal_steps`` steps are done; 0 before.
            anneal_steps: DomainBed: 1,500, or 0 to 5,000.
            ema: what stays of a moving average in a step (DomainBed: 0.95, or 0.9 to 0.99).
        """
        super().__init__()
        self._task, self._penalty, self.restart_at, self._ema = task, penalty, anneal_steps, ema
        self._place = {domain: place for place, domain in enumerate(sorted(domains))}
        size = head.out_features * (head.in_features + 1)
        self.register_buffer("variances", torch.zeros(len(domains), size))

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        risk = self._task.loss(batch.logits, batch.labels)
        penalty = scatter([self._remembered(part) for part in batch.by_domain()])
        return risk + self._penalty * penalty if self.restart_at is None or step >= self.restart_at else risk

    def _remembered(self, batch: Outputs) -> Tensor:
        """The moving average of a domain's variances ``[K x (D + 1)]``, divided by 1 - ema; its gradient is that of this batch."""
        place = self._place[int(batch.domains[0])]
        found = variances_of_gradients(self._task, batch)
        with torch.no_grad():
            before = self._ema * self.variances[place]
            self.variances[place] = before + (1 - self._ema) * found
        return before / (1 - self._ema) + found


def scatter(variances: Sequence[Tensor]) -> Tensor:
    """Squared distances of the domains' variances from their mean, averaged over domains."""
    each = torch.stack(list(variances))
    return (each - each.mean(dim=0)).square().sum(dim=1).mean()


def variances_of_gradients(task: Task, batch: Outputs) -> Tensor:
    """Over the images of a batch: of the gradient of an image's loss by the head's weights, then its biases, ``[K x (D + 1)]``.

    The head is linear, so an image's gradient is that by its logits, times its features and one.
    """
    total = task.loss(batch.logits, batch.labels) * len(batch.labels)
    (by_logits,) = torch.autograd.grad(total, batch.logits, create_graph=True)
    by_weights = by_logits[:, :, None] * batch.features[:, None, :]
    each = torch.cat([by_weights.flatten(1), by_logits], dim=1)
    return (each - each.mean(dim=0)).square().sum(dim=0) / max(1, len(each) - 1)
