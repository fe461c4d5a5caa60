"""The product: a student that adapts itself to one unlabeled batch of a domain it has never seen."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dmoe.meta.gradient import InnerLoss
from dmoe.models.copying import private_copy
from dmoe.models.expert_pool import BatchNormStatistics, ExpertPool
from dmoe.models.student import Student
from dmoe.tasks import Task


class Adapter:
    """Experts, aggregator and student around your own modules.

    ``adapt`` is a pure call: it returns a new student and changes nothing else, so one adapter serves many domains, also
    from several threads. Source: Zhong et al. 2022, algorithm 2.

    Attributes:
        student: the student before adapting.
    """

    def __init__(
        self,
        *,
        features: nn.Module,
        head: nn.Module,
        experts: Iterable[nn.Module],
        aggregator: nn.Module,
        inner_lr: float,
        inner_steps: int = 1,
        inner_loss: InnerLoss = "mean_square",
        expert_batch_norm: BatchNormStatistics = "running",
        task: Task | None = None,
    ) -> None:
        """
        Args:
            features: ``[B, C, H, W] -> [B, D]``; must be differentiable.
            head: ``[B, D] -> [B, K]``; is not adapted.
            experts: N frozen feature extractors, ``[B, C, H, W] -> [B, D']``.
            aggregator: tokens ``[B, N, D'] ->`` target features ``[B, D]``.
            inner_lr: step size of the inner steps.
            inner_loss: see :func:`~dmoe.meta.gradient.distillation_loss`.
            expert_batch_norm: see :class:`~dmoe.models.expert_pool.ExpertPool`.
            task: how logits become probabilities; left out, they are a softmax over K classes.
        """
        self._experts = ExpertPool(experts, batch_norm=expert_batch_norm)
        self._aggregator = private_copy(aggregator)
        self._inner_lr, self._inner_steps, self._inner_loss = inner_lr, inner_steps, inner_loss
        self.student = Student(features=features, head=head, task=task or Task("multiclass", num_outputs=0))

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """What the experts together would have the student's features of ``images`` be, ``[B, D]``."""
        target: Tensor = self._aggregator(self._experts(images.to(self.student.device)))
        return target

    def adapt(self, images: Tensor) -> Student:
        """The student adapted to a domain.

        Args:
            images: ``[B, C, H, W]``, unlabeled, of that domain.

        Raises:
            ValueError: ``images`` is not a batch of at least one image, or its targets are not as wide as its features.
        """
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"adapt takes a batch of images [B, C, H, W] with B >= 1, got {list(images.shape)}")
        images = images.to(self.student.device)
        return self.student.adapted(
            images,
            self.target(images),
            inner_lr=self._inner_lr,
            inner_steps=self._inner_steps,
            inner_loss=self._inner_loss,
        )
