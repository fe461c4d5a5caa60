"""What a step trains on, as a pure function of the step: any step can be asked for, in any order, by any process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.data.readers import read_ahead
from dmoe.errors import DoesNotApply, UserError
from dmoe.randomness import Key, generator, seed_of

Batch = TypeVar("Batch")


class EpochOrder:
    """Each epoch a fresh permutation of ``count`` things, cut into batches; a last, smaller batch is dropped."""

    def __init__(self, count: int, batch_size: int, *key: Key) -> None:
        self.batch_size = min(batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self._count, self._key = count, key
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """Positions of the step's batch, ``[batch_size]``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self._count, generator=generator(*self._key, "epoch", epoch))
        return self._order[within * self.batch_size : (within + 1) * self.batch_size]


def stream(make: Callable[[int], Batch], *, start: int, stop: int, workers: int = 0) -> Iterator[Batch]:
    """The batches ``make(start) .. make(stop - 1)`` in order, made ahead by ``workers`` processes if there are any.

    Raises:
        UserError: one of ``make``, whichever process it ran in, or a process was ended from outside.
    """
    steps = range(start, stop)
    processes = min(workers, len(steps))
    return read_ahead(make, steps, processes=processes) if processes else map(make, steps)


def stored_images(
    split: DomainSplit,
    batches: Sequence[Tensor],
    *,
    views: Sequence[Tensor] | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Stored views of the images of each batch of numbers, ``[B, C, H, W]``, in order; view 0, or those that ``views`` names."""

    def make(number: int) -> Tensor:
        return split.pixels(batches[number], view=views[number] if views is not None else None)

    for pixels in stream(make, start=0, stop=len(batches), workers=workers):
        yield split.finish(pixels.to(device, non_blocking=True))


class _Batches(ABC):
    """Freshly augmented images of a split, with labels and domains, by step.

    Attributes:
        steps_per_epoch: of as many images as there are to choose from.
    """

    steps_per_epoch: int

    def __init__(self, split: DomainSplit, key: tuple[Key, ...]) -> None:
        self._split, self._key = split, key

    @abstractmethod
    def index(self, step: int) -> Tensor:
        """Image numbers ``[B]``."""

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, for the split's ``finish``, labels ``[B]`` and domains ``[B]``."""
        index = self.index(step)
        pixels = self._split.pixels(index, draw=seed_of(*self._key, "draw", step))
        return pixels, self._split.labels[index], self._split.domains[index]


class SupervisedBatches(_Batches):
    """Images of some members of a split, each once an epoch."""

    def __init__(self, split: DomainSplit, members: Tensor, *, batch_size: int, key: tuple[Key, ...]) -> None:
        super().__init__(split, key)
        self._members = members
        self._order = EpochOrder(len(members), batch_size, *key)
        self.steps_per_epoch = self._order.steps_per_epoch

    def index(self, step: int) -> Tensor:
        return self._members[self._order[step]]


class DomainBatches(_Batches):
    """Images of some domains at a time, which are drawn at random, and equally many of each.

    A step takes no domain twice, and no image of it twice unless the domain has too few.
    """

    def __init__(self, split: DomainSplit, members: Tensor, *, batch_size: int, domains: int, key: tuple[Key, ...]) -> None:
        """
        Args:
            batch_size: images in a step; what cannot be shared out equally is left away.
            domains: how many a step has; all, where there are fewer.

        Raises:
            UserError: the members are of one domain only, or a step has fewer than two images of each.
        """
        super().__init__(split, key)
        self._members = [members[split.domains[members] == domain] for domain in split.domains[members].unique()]
        self._domains = min(domains, len(self._members))
        self._each = batch_size // max(1, self._domains)
        if self._domains < 2:
            raise DoesNotApply("domains: batches are to compare source domains, and there is one only")
        if self._each < 2:
            raise UserError(f"batch_size: must be at least {2 * self._domains}, two images of each domain, got {batch_size}")
        self.steps_per_epoch = max(1, len(members) // (self._domains * self._each))

    def index(self, step: int) -> Tensor:
        random = generator(*self._key, "domains", step)
        chosen = torch.randperm(len(self._members), generator=random)[: self._domains].tolist()
        return torch.cat([_some(self._members[domain], self._each, random) for domain in chosen])


def _some(members: Tensor, count: int, random: torch.Generator) -> Tensor:
    """So many of them at random; none comes twice before each has come once."""
    orders = [members[torch.randperm(len(members), generator=random)] for _ in range(-(-count // len(members)))]
    return torch.cat(orders)[:count]
