"""ARM by contextual meta-learning: a second network says in an image of its own what the domain looks like.

Source: Zhang et al., *Adaptive risk minimization*, NeurIPS 2021, section 4.1, ARM-CML.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.baselines.arm import Arm
from dmoe.models.copying import private_copy
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.tasks import Task


class ContextNetwork(nn.Sequential):
    """Images ``[B, C, H, W]`` to context channels of their size ``[B, c, H, W]``, by three convolutions.

    Published: of 5x5 and 64 channels in between, and as many context channels as the experiment says (digits: 12).
    """

    def __init__(self, *, channels: int, context_channels: int, width: int, kernel_size: int) -> None:
        def convolution(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, padding="same")

        layers: list[nn.Module] = []
        for inputs in (channels, width):
            layers += [convolution(inputs, width), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, convolution(width, context_channels))


class ArmCml(Arm):
    """The mean context of the support images is put beside every image as further channels."""

    def __init__(self, network: Network, context: nn.Module, *, task: Task) -> None:
        """
        Args:
            network: takes images with the context channels behind their own.
            context: ``[B, C, H, W] -> [B, c, H, W]``.
        """
        super().__init__()
        self.network, self.context, self._task = network, context, task

    def query_logits(self, support: Tensor, query: Sequence[Tensor]) -> Tensor:
        contexts = self.context(support.flatten(0, 1)).unflatten(0, support.shape[:2]).mean(dim=1)
        # All domains in one pass, so that batch-norm sees them together.
        logits: Tensor = self.network(torch.cat([_beside(*pair) for pair in zip(query, contexts, strict=True)]))
        return logits

    @torch.no_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """See :meth:`Arm.adapt`; every domain has a context of its own, whatever came before."""
        context = private_copy(self.context)(images.to(self.network.head.weight.device)).mean(dim=0)
        features = nn.Sequential(_WithContext(context), self.network.features)
        return Student(features=features, head=self.network.head, task=self._task)


class _WithContext(nn.Module):
    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.register_buffer("context", context)

    def forward(self, images: Tensor) -> Tensor:
        return _beside(images, self.get_buffer("context"))


def _beside(images: Tensor, context: Tensor) -> Tensor:
    """Images ``[B, C, H, W]``, each with the context ``[c, H, W]`` behind its channels."""
    return torch.cat([images, context.expand(len(images), -1, -1, -1)], dim=1)
