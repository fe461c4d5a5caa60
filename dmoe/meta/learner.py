"""One meta-training update: exact gradients of a few episodes, two optimizer steps.

Notation: S support and Q query images, N experts, D feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.distributed import World, folded
from dmoe.meta.gradient import Distill, GradientMethod, InnerLoss, MetaGradient, Params, distilled, meta_gradient
from dmoe.models.aggregator import Aggregator
from dmoe.models.folding import Folding
from dmoe.models.networks import Network, in_layout
from dmoe.optimizers import ScheduledAdam, step_if_finite
from dmoe.precision import Precision, computing_in, not_coarse
from dmoe.tasks import Task

Learns = Literal["both", "aggregator", "student"]


@dataclass(frozen=True)
class EpisodeBatch:
    """The tensors of one episode.

    Attributes:
        support: images ``[S, C, H, W]``, unlabeled.
        tokens: of the support images, masked: ``[S, N - 1, D]`` (or N).
        query: images ``[Q, C, H, W]`` with labels ``[Q]``.
    """

    support: Tensor
    tokens: Tensor
    query: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "EpisodeBatch":
        return EpisodeBatch(*(t.to(device, non_blocking=True) for t in (self.support, self.tokens, self.query, self.labels)))


@dataclass(frozen=True)
class Way:
    """How the meta-gradient is computed, see :func:`~dmoe.meta.gradient.meta_gradient`; all ways give the same numbers to rounding.

    Attributes:
        chunk_size: images at a time; None: all at once.
    """

    method: GradientMethod = "forward_over_reverse"
    chunk_size: int | None = None

    @property
    def layout(self) -> torch.memory_format:
        """How images and convolutions best lie in memory on a CPU, see docs/performance.md."""
        return torch.contiguous_format if self.method == "double_backward" else torch.channels_last

    def smaller(self, images: int) -> "Way | None":
        """A way that takes about half the memory where there are so many images in an episode; None: there is none."""
        at_once = images if self.chunk_size is None else min(images, self.chunk_size)
        if at_once <= 1:
            return None
        method = "forward_over_reverse" if self.method == "double_backward" else self.method
        return Way(method, (at_once + 1) // 2)


class ZeroTarget(nn.Module):
    """A control in the aggregator's place: the target is zero, whatever the tokens ``[B, N, D]`` say."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.new_zeros(len(tokens), tokens.shape[-1])


class MetaLearner:
    """Student and aggregator, learning from episodes. Both stay in eval mode: batch-norm is affine, dropout is off."""

    def __init__(
        self,
        *,
        student: Network,
        aggregator: Aggregator | ZeroTarget,
        task: Task,
        inner_lr: float,
        inner_steps: int = 1,
        inner_loss: InnerLoss = "mean_square",
        distill: Distill = "features",
        learns: Learns = "both",
        way: Way | None = None,
        precision: Precision = "float32",
    ) -> None:
        """
        Args:
            distill: see :func:`~dmoe.meta.gradient.distilled`; other than features, of an :class:`Aggregator` only.
            learns: which of the two; the other one gets no gradients.
        """
        self.student, self.aggregator = student.eval(), aggregator.eval()
        self._task, self._inner_lr, self._inner_steps = task, inner_lr, inner_steps
        self._inner_loss, self._precision = inner_loss, precision
        self._distill, self._learns = distill, learns
        self.way = way or Way()
        self._folding = Folding(student.features)
        self._theta = dict(student.features.named_parameters())
        self._w = dict(student.head.named_parameters())
        apart = {"features": "head.", "logits": "output_map.", "both": "-"}[distill]
        self._phi = [p for name, p in aggregator.named_parameters() if not name.startswith(apart)]

    @property
    def way(self) -> Way:
        """How gradients are computed; may be changed from one update to the next."""
        return self._way

    @way.setter
    def way(self, way: Way) -> None:
        self._way = way
        if self.student.head.weight.device.type == "cpu":
            in_layout(self.student, way.layout)

    @property
    def student_parameters(self) -> list[nn.Parameter]:
        """theta and w; none where only the aggregator learns."""
        return [] if self._learns == "aggregator" else [*self._theta.values(), *self._w.values()]

    @property
    def aggregator_parameters(self) -> list[nn.Parameter]:
        """phi: what has a part in the target, as the aggregator's head has where logits are distilled; none where only the student
        learns."""
        return [] if self._learns == "student" else self._phi

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [*self.student_parameters, *self.aggregator_parameters]

    def add_gradients(self, episodes: Sequence[EpisodeBatch], *, of: int | None = None) -> dict[str, float]:
        """Add the mean outer gradient of the episodes to ``.grad`` of theta, w and phi; returns scalars.

        Args:
            of: how many episodes the mean is taken over, where others see to the rest of them.
        """
        count = of or len(episodes)
        totals = {"query_loss": 0.0, "inner_loss": 0.0}
        if self._task.kind != "regression":
            totals["query_accuracy"] = 0.0

        def share(episode: EpisodeBatch) -> list[Tensor]:
            target = self._target(episode.tokens)
            found = self._meta_gradient(episode, target)
            phi = self.aggregator_parameters
            by_phi = torch.autograd.grad(target, phi, found.target) if phi else ()
            by_student = (*found.theta.values(), *found.w.values()) if self.student_parameters else ()
            totals["query_loss"] += found.loss.item() / count
            totals["inner_loss"] += found.inner_loss.item() / count
            if self._task.kind != "regression":
                right = self._task.predictions(found.logits) == episode.labels
                totals["query_accuracy"] += right.float().mean().item() / count
            return [gradient / count for gradient in (*by_student, *by_phi)]

        if episodes:
            for parameter, gradient in zip(self._parameters, folded(episodes, share), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return totals

    def add_up_gradients(self, values: Mapping[str, float], world: World) -> dict[str, float]:
        """Replace gradients by their sums over the processes; returns the sums of the scalars."""
        if world.size == 1:
            return dict(values)
        for parameter in self._parameters:
            if parameter.grad is None:  # there was no episode for this process
                parameter.grad = torch.zeros_like(parameter)
        world.add_up([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        world.add_up([sums])
        return dict(zip(values, sums.tolist(), strict=True))

    def update(
        self, step: int, episodes: Sequence[EpisodeBatch], student_adam: ScheduledAdam | None, aggregator_adam: ScheduledAdam | None
    ) -> dict[str, float]:
        """One step of both optimizers on the mean gradient of the episodes; returns scalars."""
        return self.apply(step, self.add_gradients(episodes), student_adam, aggregator_adam)

    def apply(
        self, step: int, values: Mapping[str, float], student_adam: ScheduledAdam | None, aggregator_adam: ScheduledAdam | None
    ) -> dict[str, float]:
        """One step of both optimizers on the gradients that are there, see :func:`~dmoe.optimizers.step_if_finite`."""
        found = {"student_gradient_norm": student_adam, "aggregator_gradient_norm": aggregator_adam}
        return step_if_finite(step, values, {name: adam for name, adam in found.items() if adam is not None})

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _target(self, tokens: Tensor) -> Tensor:
        """What is distilled of the aggregator."""
        aggregator = self.aggregator
        target: Tensor = aggregator(tokens)
        if isinstance(aggregator, ZeroTarget):
            return target
        return distilled(target, lambda _: aggregator.logits(tokens), self._distill)

    def _meta_gradient(self, episode: EpisodeBatch, target: Tensor) -> MetaGradient:
        support, query = episode.support, episode.query
        if support.device.type == "cpu":
            support, query = (images.contiguous(memory_format=self.way.layout) for images in (support, query))
        with computing_in(self._precision, support.device):
            return meta_gradient(
                features=self._features,
                prepare=self._folding.prepare,
                head=self._head,
                loss=self._task.loss,
                theta=self._theta,
                w=self._w,
                target=target,
                support=support,
                query=query,
                labels=episode.labels,
                inner_lr=self._inner_lr,
                inner_steps=self._inner_steps,
                inner_loss=self._inner_loss,
                distill=self._distill,
                method=self.way.method,
                chunk_size=self.way.chunk_size,
            )

    def _features(self, psi: Params, images: Tensor) -> Tensor:
        return not_coarse(self._folding.features(psi, images))

    def _head(self, w: Params, features: Tensor) -> Tensor:
        return not_coarse(functional_call(self.student.head, dict(w), (features,)))
