"""The task loss alone."""

from torch import Tensor

from dmoe.objectives.base import Objective, Outputs
from dmoe.tasks import Task


class ERM(Objective):
    """Empirical risk minimisation: the task loss, whatever the domains. Source: Vapnik, *Statistical Learning Theory*, 1998."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        return self._task.loss(batch.logits, batch.labels)
