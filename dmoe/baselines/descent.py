"""Gradient steps on unlabeled images: what the methods that learn at test time have in common."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmoe.baselines.shared import class_logits, normalising_by_batch, with_statistics_of
from dmoe.models.copying import private_copy, set_parameters
from dmoe.models.student import Student
from dmoe.tasks import Task

Optimizer = Literal["adam", "sgd"]
"""Adam with its usual moments; gradient descent with momentum 0.9."""


class Stepped(Student):
    """A student after such steps, with what is needed to go on.

    Attributes:
        optimizer: its state.
        average: a moving average, of methods that keep one.
    """

    def __init__(
        self, *, features: nn.Module, head: nn.Module, task: Task, optimizer: dict[str, Any], average: Tensor | None
    ) -> None:
        super().__init__(features=features, head=head, task=task)
        self.optimizer, self.average = optimizer, average


class Descent:
    """Some of a student's feature parameters on their way down; the student stays as it is.

    Batch-norm goes by the batch at hand meanwhile. It starts with the optimizer's state of a :class:`Stepped` student.

    Attributes:
        parameters: those that move, by name.
    """

    def __init__(self, student: Student, names: Iterable[str], *, lr: float, optimizer: Optimizer) -> None:
        self._student = student
        self._features = normalising_by_batch(copy.deepcopy(student.features)).requires_grad_(False)
        self.parameters = {name: self._features.get_parameter(name).requires_grad_() for name in names}
        moving = list(self.parameters.values())
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(moving, lr=lr) if optimizer == "adam" else torch.optim.SGD(moving, lr=lr, momentum=0.9)
        )
        if isinstance(student, Stepped):
            self._optimizer.load_state_dict(copy.deepcopy(student.optimizer))

    def logits(self, images: Tensor) -> Tensor:
        """Logits of classes ``[B, K]``, with their graph."""
        return class_logits(self._student.head(self._features(images)), self._student.task)

    def gradients(self, loss: Tensor) -> Sequence[Tensor]:
        """Of the loss, in the order of ``parameters``."""
        return torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step of the optimizer."""
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def student(self, images: Tensor, *, average: Tensor | None = None) -> Stepped:
        """The student with these parameters, and the statistics of ``images`` for its predictions."""
        features = private_copy(self._student.features)
        set_parameters(features, {name: value.detach().clone() for name, value in self.parameters.items()})
        return Stepped(
            features=with_statistics_of(images, features),
            head=self._student.head,
            task=self._student.task,
            optimizer=copy.deepcopy(self._optimizer.state_dict()),
            average=average,
        )
