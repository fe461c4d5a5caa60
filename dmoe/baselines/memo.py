"""MEMO: each image on its own, by a network that has been made certain about what all its augmentations together show.

Source: Zhang et al., *MEMO: test time robustness via adaptation and augmentation*, NeurIPS 2022.
Notation: B images, A augmentations of each, K classes (2 for a binary task).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dmoe.baselines.shared import class_logits, entropies, require_classes
from dmoe.models.folding import Folding
from dmoe.models.student import Student
from dmoe.randomness import generator

AT_ONCE, WEIGHTS_AT_ONCE = 64, 1 << 25
"""Images that have networks of their own in memory together, and the numbers in these networks; at least one image."""

TURN, SCALE, SHIFT = math.radians(10), 0.1, 0.1
"""The widest augmentation: radians, the logarithm of a factor, a share of the image."""

Weights = Mapping[str, Tensor]


def random_movements(count: int, *, seed: int) -> Tensor:
    """Small turns (radians), scales (logarithms) and shifts (shares of width and height), ``[A, 4]``."""
    uniform = 2 * torch.rand(count, 4, generator=generator(seed, "memo")) - 1
    return uniform * torch.tensor([TURN, SCALE, SHIFT, SHIFT])


def augmented(images: Tensor, movements: Tensor) -> Tensor:
    """Every image ``[B, C, H, W]`` by every movement, ``[B, A, C, H, W]``; what is beyond an edge is as the edge.

    Such movements leave any image what it is, whatever it shows and however its pixels are scaled.
    """
    count, channels, height, width = images.shape
    movements = movements.to(images)
    turn, zoom, shift = movements[:, 0], movements[:, 1].exp(), 2 * movements[:, 2:]
    # Coordinates go from -1 to 1 whatever the shape; a turn is one in pixels.
    rows = [zoom * turn.cos(), -zoom * turn.sin() * height / width, zoom * turn.sin() * width / height, zoom * turn.cos()]
    maps = torch.cat([torch.stack(rows, dim=1).view(-1, 2, 2), shift.unsqueeze(2)], dim=2)
    grid = F.affine_grid(maps, [len(maps), 1, height, width], align_corners=False)
    sheets = images.reshape(1, -1, height, width).expand(len(maps), -1, -1, -1)
    moved = F.grid_sample(sheets, grid, padding_mode="border", align_corners=False)
    return moved.view(len(maps), count, channels, height, width).transpose(0, 1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """The entropy of the mean prediction, from logits ``[A, K]``; eq. 2 and 3."""
    return entropies(logits.log_softmax(dim=1).logsumexp(dim=0))  # the mean's logarithm, but for a constant


class Certain(Student):
    """A student that adapts to each image when it is to predict it, and forgets it at once."""

    def __init__(self, student: Student, *, movements: Tensor, lr: float, steps: int) -> None:
        super().__init__(features=student.features, head=student.head, task=student.task)
        self._movements, self._lr, self._steps = movements, lr, steps
        self._folding = Folding(self.features)
        self._weights = {f"features.{name}": value.detach() for name, value in self.features.named_parameters()}
        self._weights |= {f"head.{name}": value.detach() for name, value in self.head.named_parameters()}

    @torch.no_grad()
    def logits(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Logits ``[B, K]``; no image's depend on those beside it."""
        room = WEIGHTS_AT_ONCE // sum(value.numel() for value in self._weights.values())
        parts = (part.to(self.device) for part in images.split(min(batch_size, AT_ONCE, max(1, room))))
        return torch.cat([vmap(self._logits_of)(part, augmented(part, self._movements)) for part in parts])

    def _logits_of(self, image: Tensor, views: Tensor) -> Tensor:
        """Of one image, after steps on its views ``[A, C, H, W]``."""

        def loss(weights: Weights) -> Tensor:
            return marginal_entropy(class_logits(self._applied(weights, views), self.task))

        weights = self._weights
        for _ in range(self._steps):
            gradients = grad(loss)(weights)
            weights = {name: value - self._lr * gradients[name] for name, value in weights.items()}
        return self._applied(weights, image[None])[0]

    def _applied(self, weights: Weights, images: Tensor) -> Tensor:
        features = self._folding.features(self._folding.prepare(_under("features.", weights)), images)
        logits: Tensor = functional_call(self.head, _under("head.", weights), (features,))
        return logits


class Memo:
    """At prediction, steps of all weights down the entropy of an image's mean prediction over small turns, scales and shifts.

    The movements are the same for all images, so a prediction is a function of its image. Batch-norm goes by the source's
    statistics. Published: a step of gradient descent over 32 to 64 views by AugMix, lr 0.005 (CIFAR-10-C) or 0.00025 (ImageNet-C,
    where 1/17 of batch-norm's statistics are the image's own).
    """

    def __init__(self, student: Student, *, lr: float = 5e-3, steps: int = 1, augmentations: int = 8, seed: int = 0) -> None:
        """
        Args:
            augmentations: A; time and memory grow with it.
            seed: of the movements.

        Raises:
            DoesNotApply: a regression.
        """
        require_classes("MEMO", student.task)
        self._student = Certain(student, movements=random_movements(augmentations, seed=seed), lr=lr, steps=steps)

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """The support is not looked at, and nothing is remembered: every call returns the same student."""
        return self._student


def _under(prefix: str, weights: Weights) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
