"""Several processes that work on one run together, as torchrun starts them; alone, a process is a world of one.

They share the run folder. The first of them writes; the others wait wherever only one can work.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dmoe.console import fall_silent
from dmoe.errors import UserError

Thing = TypeVar("Thing")

LONGEST_STEP = timedelta(hours=1)
"""After which a process that does not answer counts as lost. One that ends is missed at once."""

LONGEST_STAGE = timedelta(days=60)
"""The same, where the others wait for what only the first one does."""

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class World:
    """This process among those that work together.

    Attributes:
        rank: its number.
        size: how many they are.
        local_rank: its number among those on this machine.
        local_size: how many of them are on this machine, which share its GPUs and cores.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, things: Iterable[Thing]) -> list[Thing]:
        """This process's part of the things, which all have in the same order; a disjoint one for each process."""
        return list(things)[self.rank :: self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type, here and in all other processes, by their sums over the processes, in one message.

        Where the number of processes is a power of two, it is always the same numbers that are added to each other: see
        :func:`folded`.

        Raises:
            UserError: another process is lost.
        """
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            with _lost_processes_told():
                if self.size & (self.size - 1):
                    dist.all_reduce(flat)
                else:
                    self._add_up_in_pairs(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _add_up_in_pairs(self, flat: Tensor) -> None:
        theirs, distance = torch.empty_like(flat), self.size // 2
        while distance:
            other = self.rank ^ distance
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, flat, other), dist.P2POp(dist.irecv, theirs, other)]):
                work.wait()
            flat += theirs
            distance //= 2

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors everywhere what they are in the first process.

        Raises:
            UserError: another process is lost.
        """
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_type.values():
            if not self.is_first:
                for tensor in alike:
                    tensor.zero_()
            self.add_up(alike)

    def any(self, here: bool) -> bool:
        """Whether it is so in any of the processes."""
        if self.size == 1:
            return here
        count = torch.tensor(int(here))
        self.add_up([count])
        return bool(count)

    def wait(self) -> None:
        """Until all processes have come here, however long one of them takes."""
        if self.size > 1:
            with _lost_processes_told():
                work = dist.barrier(group=_Groups.patient, async_op=True)
                while not work.is_completed():  # in Python, where a signal is heard
                    time.sleep(POLL_SECONDS)
                work.wait()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives in the first process, plain data; the others do not call it."""
        if self.size == 1:
            return make()
        made = [make() if self.is_first else None]
        self.wait()  # with patience: making it may take long
        with _lost_processes_told():
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def gathered(self, here: Thing) -> list[Thing]:
        """What each of the processes has, plain data, in the order of their numbers."""
        if self.size == 1:
            return [here]
        everywhere: list[Any] = [None] * self.size
        with _lost_processes_told():
            dist.all_gather_object(everywhere, here)
        return everywhere


ALONE = World()


def folded(things: Sequence[Thing], value: Callable[[Thing], list[Tensor]]) -> list[Tensor]:
    """The sums of the values of the things, in an order of adding that sharing them among 2, 4, 8, ... processes does not change.

    Those at even places together, those at odd places together, and so on; which is what :meth:`World.share` gives to each of
    two, four, ... processes, and :meth:`World.add_up` adds. Rounding is then the same, however many processes there are.
    """
    if len(things) == 1:
        return value(things[0])
    sums, others = folded(things[0::2], value), folded(things[1::2], value)
    return [total.add_(other) for total, other in zip(sums, others, strict=True)]


class _Groups:
    patient: Any = None


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun has put this process into; otherwise a world of one.

    Raises:
        UserError: the other processes cannot be reached.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _lost_processes_told():
        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps one store over all its restarts; addresses of processes that have ended must not be found there.
        fresh = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=LONGEST_STEP)
        _Groups.patient = dist.new_group(backend="gloo", timeout=LONGEST_STAGE)
    local_rank, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    world = World(rank, size, local_rank, local_size)
    if not world.is_first:
        fall_silent()
    yield world
    dist.destroy_process_group()  # not after an error: that would wait for processes that may be lost


@contextmanager
def _lost_processes_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(
            f"another process of this run has ended or cannot be reached ({why}): its own message says why; "
            "the same command goes on from the last checkpoint"
        ) from error
