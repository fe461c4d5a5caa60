"""The product: a student that adapts itself to one unlabeled batch of a domain it has never seen, and says when that went oddly."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmoe.diagnosis import Ranges, Statistics
from dmoe.errors import SuspectAdaptation
from dmoe.meta.gradient import Distill, InnerLoss, distilled
from dmoe.models.copying import private_copy
from dmoe.models.expert_pool import BatchNormStatistics, ExpertPool
from dmoe.models.student import InnerSteps, Student
from dmoe.precision import Precision
from dmoe.tasks import Task

OnSuspect = Literal["keep", "warn", "fall_back"]
"""What becomes of an adapted student that is suspect: returned; returned with a warning; the unadapted one returned instead."""


class Adapter:
    """Experts, aggregator and student around your own modules.

    ``adapt`` is a pure call: it returns a new student and changes nothing else, so one adapter serves many domains, also
    from several threads. Source: Zhong et al. 2022, algorithm 2.

    Attributes:
        student: the student before adapting.
        experts: as they are asked, images ``[B, C, H, W]`` to tokens ``[B, N, D']``.
        aggregator: tokens to target features.
        ranges: what adapting does in training episodes; None: not known, and nothing is watched.
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
        distill: Distill = "features",
        expert_batch_norm: BatchNormStatistics = "running",
        expert_precision: Precision = "float32",
        task: Task | None = None,
        ranges: Ranges | None = None,
        on_suspect: OnSuspect = "warn",
    ) -> None:
        """
        Args:
            features: ``[B, C, H, W] -> [B, D]``; must be differentiable.
            head: ``[B, D] -> [B, K]``; is not adapted.
            experts: N frozen feature extractors, ``[B, C, H, W] -> [B, D']``.
            aggregator: tokens ``[B, N, D'] ->`` target features ``[B, D]``.
            inner_lr: step size of the inner steps.
            inner_loss: see :func:`~dmoe.meta.gradient.distillation_loss`.
            distill: see :func:`~dmoe.meta.gradient.distilled`; for other than features, the aggregator needs a method ``logits``,
                tokens to ``[B, K]``. Where a diagnosis speaks of features and targets, it is then of what is distilled.
            expert_batch_norm: see :class:`~dmoe.models.expert_pool.ExpertPool`.
            expert_precision: that the experts compute in, see :func:`~dmoe.precision.computing_in`.
            task: how logits become probabilities; left out, they are a softmax over K classes.
            ranges: of training episodes, see :mod:`dmoe.diagnosis`; with them, every adapted student has a diagnosis.
            on_suspect: what is done where the diagnosis is suspect; ``warn`` is by :class:`~dmoe.errors.SuspectAdaptation`.
        """
        self.experts = ExpertPool(experts, batch_norm=expert_batch_norm, precision=expert_precision)
        self.aggregator: Any = private_copy(aggregator)
        self.ranges, self._on_suspect = ranges, on_suspect
        self._distill: Distill = distill
        self._inner: InnerSteps = {"inner_lr": inner_lr, "inner_steps": inner_steps, "inner_loss": inner_loss}
        self.student = Student(features=features, head=head, task=task or Task("multiclass", num_outputs=0))

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """What the experts together would have the student's features of ``images`` be, ``[B, D]``; or its logits, where those are
        distilled, see :func:`~dmoe.meta.gradient.distilled`."""
        return self._target_of(self.experts(images.to(self.student.device)))

    def adapt(self, images: Tensor, *, tokens: Tensor | None = None, start: Student | None = None) -> Student:
        """The student adapted to a domain. Its ``diagnosis`` says whether adapting went as in training episodes.

        Args:
            images: ``[B, C, H, W]``, unlabeled, of that domain.
            tokens: what the experts say of them, ``[B, N, D']``, where that is known already; the experts are not asked then.
            start: a student that was returned before, to go on from; None: the unadapted one. It is what a suspect falls back to.

        Raises:
            ValueError: ``images`` is not a batch of at least one image, or its targets are not as wide as its features.
        """
        start = start or self.student
        return self._judged(self._adapted(images, tokens, start, watched=self.ranges is not None), start)

    def measure(self, images: Tensor, *, tokens: Tensor | None = None) -> Statistics:
        """What ranges are learned from: the statistics of adapting to ``images``, by name; see :func:`~dmoe.diagnosis.measured`."""
        return self._adapted(images, tokens, self.student, watched=True).diagnosis.statistics

    def _adapted(self, images: Tensor, tokens: Tensor | None, start: Student, *, watched: bool) -> Student:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"adapt takes a batch of images [B, C, H, W] with B >= 1, got {list(images.shape)}")
        images = images.to(self.student.device)
        target = self.target(images) if tokens is None else self._target_of(tokens.to(self.student.device))
        return start.adapted(images, target, watched=watched, distill=self._distill, **self._inner)

    def adapt_many(self, images: Tensor) -> list[Student]:
        """The students adapted to several domains, in one pass through the experts, the aggregator and the inner steps.

        The same as :meth:`adapt` of each, to rounding. It pays where one domain alone leaves the device waiting: small networks and
        few images; memory grows with the number of domains.

        Args:
            images: ``[G, B, C, H, W]``, for each of G domains B unlabeled images.

        Raises:
            ValueError: ``images`` is not that.
        """
        if images.ndim != 5 or 0 in images.shape[:2]:
            raise ValueError(f"adapt_many takes images [G, B, C, H, W] with G, B >= 1, got {list(images.shape)}")
        images = images.to(self.student.device)
        domains, count = images.shape[:2]
        if self.experts.batch_norm == "batch":  # each domain's batch has its own statistics
            target = torch.cat([self.target(part) for part in images])
        else:
            target = self.target(images.flatten(0, 1))
        targets, watched = target.unflatten(0, (domains, count)), self.ranges is not None
        students = self.student.adapted_to_many(images, targets, watched=watched, distill=self._distill, **self._inner)
        for number, student in enumerate(students):
            students[number] = self._judged(student, self.student)
        return students

    def _judged(self, adapted: Student, start: Student) -> Student:
        """What is done with an adapted student by its diagnosis."""
        if self.ranges is None:
            return adapted
        diagnosis = self.ranges.judged(adapted.diagnosis.statistics, images=adapted.diagnosis.images)
        if diagnosis.suspect and self._on_suspect == "warn":
            warnings.warn(SuspectAdaptation(str(diagnosis)), stacklevel=3)
        falls_back = diagnosis.suspect and self._on_suspect == "fall_back"
        return (start if falls_back else adapted).diagnosed(diagnosis)

    @torch.no_grad()
    def _target_of(self, tokens: Tensor) -> Tensor:
        return distilled(self.aggregator(tokens), lambda _: self.aggregator.logits(tokens), self._distill)
