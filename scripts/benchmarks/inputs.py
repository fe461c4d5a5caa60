"""Networks and images of one episode, random but the same on both sides."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmoe.machine import keep_freed_memory
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network, build_network
from dmoe.precision import computing_in
from dmoe.tasks import Task
from scripts.benchmarks.measuring import Make, Place, Step

CLASSES, INNER_LR, LR = 100, 1e-3, 1e-6
TASK = Task("multiclass", num_outputs=CLASSES)


@dataclass(frozen=True)
class Setting:
    """Sizes of an episode. ``experts`` is N; N - 1 tokens are left of an image once its own expert is masked."""

    backbone: str
    size: int
    support: int
    query: int
    experts: int
    inner_steps: int = 1
    channels: int = 3

    def network(self) -> Network:
        shape = (self.channels, self.size, self.size)
        return build_network(self.backbone, image_shape=shape, num_outputs=CLASSES).eval()


class Episode:
    """A student, an aggregator and one domain's images."""

    def __init__(self, setting: Setting, place: Place, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.setting, self.precision, self.dtype = setting, place.precision, dtype
        self.device = device = place.at
        self.student = setting.network().to(device, dtype)
        self.teacher = new_aggregator(self.student.width, device, dtype)
        self.x_support, self.x_query = self.images(setting.support), self.images(setting.query)
        self.labels = torch.randint(CLASSES, (setting.query,), device=device)
        self.own = torch.zeros(setting.support, dtype=torch.int64, device=device)
        self.tokens = torch.randn(setting.support, setting.experts, self.student.width, device=device, dtype=dtype)

    def images(self, count: int) -> Tensor:
        size = self.setting.size
        return torch.randn(count, self.setting.channels, size, size, device=self.device, dtype=self.dtype)

    def experts(self) -> list[Network]:
        torch.manual_seed(1)
        return [self.setting.network().to(self.device, self.dtype) for _ in range(self.setting.experts)]


def new_aggregator(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Aggregator:
    return Aggregator(width=width, num_outputs=CLASSES, depth=1, heads=16, dropout=0.1).eval().to(device, dtype)


def as_delivered(images: Tensor) -> Tensor:
    """Images with the strides that our pipeline gives them: channels last."""
    return images.contiguous(memory_format=torch.channels_last)


def published(make: Callable[..., Step], setting: Setting, **choices: Any) -> Make:
    """A side without our settings of the allocator; lower precision is autocast round the whole step."""
    return partial(_made, make, setting, choices, False, True)


def ours(make: Callable[..., Step], setting: Setting, **choices: Any) -> Make:
    """A side with the allocator set as by our entry points; its parts know themselves what to compute in lower precision."""
    return partial(_made, make, setting, choices, True, False)


def bound(make: Callable[..., Step], setting: Setting, **choices: Any) -> Make:
    """Bare passes, under the best conditions that there are."""
    return partial(_made, make, setting, choices, True, True)


def _made(
    make: Callable[..., Step], setting: Setting, choices: dict[str, Any], keeps_memory: bool, casts: bool, place: Place
) -> Step:
    if keeps_memory:
        keep_freed_memory()
    step = make(Episode(setting, place), **choices)

    def cast() -> None:
        with computing_in(place.precision, place.at):
            step()

    return cast if casts else step
