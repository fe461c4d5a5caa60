"""What a step trains on, as a pure function of the step: any step can be asked for, in any order, by any process."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.data.readers import read_ahead
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


class SupervisedBatches:
    """Freshly augmented images and labels of some members of a split, by step.

    Attributes:
        steps_per_epoch: of this many images.
    """

    def __init__(self, split: DomainSplit, members: Tensor, *, batch_size: int, key: tuple[Key, ...]) -> None:
        self._split, self._members, self._key = split, members, key
        self._order = EpochOrder(len(members), batch_size, *key)
        self.steps_per_epoch = self._order.steps_per_epoch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels, for the split's ``finish``, and labels ``[B]``."""
        index = self.index(step)
        return self._split.pixels(index, draw=seed_of(*self._key, "draw", step)), self._split.labels[index]

    def index(self, step: int) -> Tensor:
        """Image numbers ``[B]``."""
        return self._members[self._order[step]]
