"""The network that is shipped: features and head, ready to predict."""

from collections.abc import Mapping
from itertools import chain
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmoe.diagnosis import Diagnosis, measured
from dmoe.meta.gradient import Apply, Distill, InnerLoss, Params, adapted_from, distilled
from dmoe.models.copying import private_copy, set_parameters
from dmoe.tasks import Task


class InnerSteps(TypedDict, total=False):
    """How a student is adapted, see :func:`~dmoe.meta.gradient.adapted_parameters`."""

    inner_lr: Required[float]
    inner_steps: int
    inner_loss: InnerLoss


class Student:
    """A classifier that does not change: adapting it makes another one.

    Attributes:
        features: ``[B, C, H, W] -> [B, D]``, in eval mode.
        head: ``[B, D] -> [B, K]``, in eval mode.
        diagnosis: what adapting did to the images that it was adapted to, where that was watched.
    """

    diagnosis: Diagnosis = Diagnosis()

    def __init__(self, *, features: nn.Module, head: nn.Module, task: Task) -> None:
        """The modules are wrapped, not copied and not changed; in-place changes of their tensors show here."""
        self.features, self.head, self.task = private_copy(features), private_copy(head), task

    def adapted(
        self,
        images: Tensor,
        target: Tensor,
        *,
        watched: bool = False,
        distill: Distill = "features",
        **inner: Unpack[InnerSteps],
    ) -> "Student":
        """This student after gradient steps of its features towards ``target`` ``[B, D]`` on ``images``.

        Args:
            distill: what the target is of, see :func:`~dmoe.meta.gradient.distilled`; ``[B, K]`` or ``[B, D + K]`` with logits.
            watched: whether its diagnosis has the statistics of adapting; costs one more pass of the images through the features.

        Raises:
            ValueError: what is distilled of the images has another shape than the target.
        """
        features = private_copy(self.features)  # the new student's own; functional_call swaps tensors inside while it runs
        told = self._tells(_calls(features), distill)
        parameters, before = adapted_from(told, dict(features.named_parameters()), images, target, **inner)
        student = self._with(features, parameters)
        if not watched:
            return student
        with torch.no_grad():
            (statistics,) = self._measured(before[None], student.features(images)[None], target[None], distill)
        return student.diagnosed(Diagnosis(statistics, images=len(images)))

    def adapted_to_many(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        watched: bool = False,
        distill: Distill = "features",
        **inner: Unpack[InnerSteps],
    ) -> list["Student"]:
        """A student for each of G domains, from images ``[G, B, C, H, W]`` and targets ``[G, B, D]``, in one vectorised pass."""
        features = private_copy(self.features)
        call, theta = _calls(features), {name: p.detach() for name, p in features.named_parameters()}
        told = self._tells(call, distill)
        with sdpa_kernel(SDPBackend.MATH):
            found, before = vmap(lambda x, t: adapted_from(told, theta, x, t, **inner))(images, targets)
        each = [{name: value[number] for name, value in found.items()} for number in range(len(images))]
        students = [self._with(private_copy(self.features), parameters) for parameters in each]
        if not watched:
            return students
        with torch.no_grad():
            after = vmap(call)(found, images)
            all_statistics = self._measured(before, after, targets, distill)
        diagnoses = [Diagnosis(statistics, images=images.shape[1]) for statistics in all_statistics]
        return [student.diagnosed(diagnosis) for student, diagnosis in zip(students, diagnoses, strict=True)]

    def diagnosed(self, diagnosis: Diagnosis) -> "Student":
        """The same student with another diagnosis."""
        student = Student.__new__(Student)
        student.features, student.head, student.task, student.diagnosis = self.features, self.head, self.task, diagnosis
        return student

    def _tells(self, features: Apply, distill: Distill) -> Apply:
        """Feature parameters and images to what is distilled of them."""
        head, w = _calls(self.head), {name: p.detach() for name, p in self.head.named_parameters()}
        return lambda theta, images: distilled(features(theta, images), lambda found: head(w, found), distill)

    def _measured(self, before: Tensor, after: Tensor, targets: Tensor, distill: Distill) -> list[dict[str, float]]:
        """The statistics of adapting to each of G domains.

        Args:
            before: what is distilled, before adapting; targets are of that too.
            after: the features after it, ``[G, B, D]``.
        """
        features = after.flatten(0, 1)
        logits = self.head(features)
        outputs = self.task.probabilities(logits).unflatten(0, after.shape[:2])
        told = distilled(features, lambda _: logits, distill).unflatten(0, after.shape[:2])
        return measured(before, told, targets, outputs, classes=self.task.kind != "regression")

    def _with(self, features: nn.Module, parameters: Mapping[str, Tensor]) -> "Student":
        """A student around ``features``, which become its own, with other parameters."""
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


def _calls(module: nn.Module) -> Apply:
    """The module as a function of its parameters and what it is given."""
    buffers = dict(module.named_buffers())

    def call(theta: Params, images: Tensor) -> Tensor:
        features: Tensor = functional_call(module, (dict(theta), buffers), (images,))
        return features

    return call
