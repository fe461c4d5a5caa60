"""The network that is shipped: features and head, ready to predict."""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.meta.gradient import InnerLoss, adapted_parameters
from dmoe.models.copying import private_copy, set_parameters
from dmoe.tasks import Task


class Student:
    """A classifier that does not change: adapting it makes another one.

    Attributes:
        features: ``[B, C, H, W] -> [B, D]``, in eval mode.
        head: ``[B, D] -> [B, K]``, in eval mode.
    """

    def __init__(self, *, features: nn.Module, head: nn.Module, task: Task) -> None:
        """The modules are wrapped, not copied and not changed; in-place changes of their tensors show here."""
        self.features, self.head, self.task = private_copy(features), private_copy(head), task

    def adapted(
        self,
        images: Tensor,
        target: Tensor,
        *,
        inner_lr: float,
        inner_steps: int = 1,
        inner_loss: InnerLoss = "mean_square",
    ) -> "Student":
        """This student after gradient steps of its features towards ``target`` ``[B, D]`` on ``images``.

        Raises:
            ValueError: the features of the images have another shape than the target.
        """
        features = private_copy(self.features)  # the new student's own; functional_call swaps tensors inside while it runs
        buffers = dict(features.named_buffers())
        parameters = adapted_parameters(
            lambda theta, x: functional_call(features, (dict(theta), buffers), (x,)),
            dict(features.named_parameters()),
            images,
            target,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            inner_loss=inner_loss,
        )
        set_parameters(features, parameters)
        student = Student.__new__(Student)  # what it wraps is private already
        student.features, student.head, student.task = features, self.head, self.task
        return student

    @property
    def device(self) -> torch.device:
        return next(chain(self.features.parameters(), self.head.parameters())).device

    @torch.no_grad()
    def logits(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Logits ``[B, K]`` on the student's device, computed ``batch_size`` images at a time."""
        return torch.cat([self.head(self.features(part.to(self.device))) for part in images.split(batch_size)])

    def predict(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Probabilities ``[B, K]`` (binary task: ``[B, 2]``; regression: the values ``[B, 1]``)."""
        return self.task.probabilities(self.logits(images, batch_size=batch_size))

    def parameters(self) -> Mapping[str, Tensor]:
        """Feature parameters by name."""
        return dict(self.features.named_parameters())
