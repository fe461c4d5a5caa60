"""What every objective is, and what several of them do.

Notation: B images of E domains in a batch, C x H x W pixels, D features, K outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes:
        features: ``[B, D]``.
        logits: ``[B, K]``.
        labels: ``[B]``.
        domains: the source domain of each image, ``[B]``.
        images: what it was shown, ``[B, C, H, W]``; None in the part of a domain.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    domains: Tensor
    images: Tensor | None = None

    def by_domain(self) -> "Iterator[Outputs]":
        """The part of each domain, in the order of their numbers."""
        for domain in self.domains.unique():
            chosen = self.domains == domain
            yield Outputs(self.features[chosen], self.logits[chosen], self.labels[chosen], self.domains[chosen])


def gradient_of_loss(loss: Callable[..., Tensor], tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Leave the gradient of a batch's loss in the parameters; returns the loss.

    Args:
        loss: of the batch's tensors.
    """
    found = loss(*tensors)
    found.backward()
    return found


Gradient = Callable[[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]
"""What leaves gradients in parameters, as :func:`gradient_of_loss` does."""


class Objective(ABC):
    """A loss to train by. One with weights or state of its own is an ``nn.Module`` too: they are trained and kept with the network.

    Attributes:
        restart_at: the step before which the optimizer forgets its moments, where the loss changes its scale there; None: never.
    """

    restart_at: int | None = None

    @abstractmethod
    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        """A scalar."""

    def gradient(self, loss: Callable[..., Tensor], tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """What a step follows: the gradient of the loss, unless an objective has another; see :func:`gradient_of_loss`."""
        return gradient_of_loss(loss, tensors, parameters)


def mean_over_pairs(parts: Sequence[T], distance: Callable[[T, T], Tensor], *, none: Tensor) -> Tensor:
    """The mean distance of two parts of a batch; ``none`` where there is one part only."""
    pairs = [distance(one, other) for one, other in combinations(parts, 2)]
    return torch.stack(pairs).mean() if pairs else none
