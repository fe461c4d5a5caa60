"""Logits that no domain would rather have scaled."""

import torch
from torch import Tensor

from dmoe.objectives.base import Objective, Outputs
from dmoe.tasks import Task


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
