"""Batches made ahead by other processes, in memory that is shared with them.

A reader has a few slots of memory for as long as it lives. It makes a batch in one of them, and through its pipe goes no more
than a note of where the tensors lie. A slot is used again once nobody holds a tensor in it: nothing is copied on the way, and
the system need not hand out fresh pages for every batch, which would cost more than all the rest. The memory has no name, so
nothing is left behind however a process ends.
"""

import io
import math
import mmap
import os
import pickle
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dmoe.errors import UserError
from dmoe.interruption import ignore_signals_of_others

Batch = TypeVar("Batch")
Place = tuple[int, torch.dtype, tuple[int, ...]]
"""Of a tensor in a slot: first byte, type, shape."""

SLOTS = 4
"""For each reader: a batch that is in use, one that waits for the steps before it, and those that are asked for."""
ASKED_AT_ONCE = 2
"""Of a reader: a batch that is being made, and one to go on with."""
SLOT_BYTES = 4 << 30
"""Addresses, not memory: of a slot so much is taken as its largest batch needs."""
ALIGNMENT = 64
SECONDS_BETWEEN_LOOKS = 2.0
"""After which a reader that has nothing to do looks whether anybody is left to ask."""

# Python knows the name from 3.12 on. Without it a system that counts addresses as memory would refuse.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class _Slot:
    """Shared memory for one batch, filled from its beginning."""

    def __init__(self) -> None:
        try:
            shared = mmap.mmap(-1, SLOT_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except OSError as error:
            why = f"no addresses for shared memory ({error.strerror})"
            raise UserError(f"data.workers: {why}: choose fewer, or 0 to read in the process that trains") from None
        self._bytes = np.frombuffer(shared, dtype=np.uint8)
        self._tensor = torch.from_numpy(self._bytes)
        self._used = 0
        self.is_asked, self.lent_at = False, 0.0
        self._lent: weakref.ref[np.ndarray] | None = None

    def clear(self) -> None:
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _tensor_at(self._tensor, self._reserve(shape, dtype))

    def place_of(self, tensor: Tensor) -> Place:
        """Where it lies; a tensor from elsewhere is copied here."""
        first = tensor.data_ptr() - self._tensor.data_ptr()
        if 0 <= first < self._used and tensor.is_contiguous():
            return first, tensor.dtype, tuple(tensor.shape)
        place = self._reserve(tensor.shape, tensor.dtype)
        _tensor_at(self._tensor, place).copy_(tensor)
        return place

    @property
    def is_free(self) -> bool:
        """Whether it was neither asked for nor is held. Looked up, not told: what a weak reference calls would swallow a Ctrl-C."""
        return not self.is_asked and (self._lent is None or self._lent() is None)

    def lend(self) -> Tensor:
        """All bytes of the slot; it is in use until no tensor that was made from them is left."""
        lent = self._bytes[:]
        self._lent, self.is_asked, self.lent_at = weakref.ref(lent), False, time.monotonic()
        return torch.from_numpy(lent)

    def _reserve(self, shape: Sequence[int], dtype: torch.dtype) -> Place:
        first, size = self._used, math.prod(shape) * dtype.itemsize
        if first + size > SLOT_BYTES:
            raise UserError(f"a batch takes more than {SLOT_BYTES >> 30} GiB: make it smaller, or choose data.workers=0")
        self._used += math.ceil(size / ALIGNMENT) * ALIGNMENT
        return first, dtype, tuple(shape)


def _tensor_at(memory: Tensor, place: Place) -> Tensor:
    first, dtype, shape = place
    return memory[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


_filling: _Slot | None = None
"""In a reader: the slot of the batch that it makes."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to fill, as ``torch.empty``. In a reader it lies where the other process will find it."""
    return torch.empty(tuple(shape), dtype=dtype) if _filling is None else _filling.empty(shape, dtype)


def read_ahead(make: Callable[[int], Batch], steps: range, *, processes: int) -> Iterator[Batch]:
    """``make(step)`` for each of the steps, in order, made by ``processes`` readers. Tensors, however nested, may be kept.

    Where there is a GPU they are in pinned memory.

    Raises:
        UserError: one of ``make``, or a reader was ended from outside, or there is no room for shared memory.
    """
    pinned = torch.cuda.is_available()
    made = _in_turn(make, steps, processes, pinned=pinned)
    return _one_ahead(made) if pinned else made


def _in_turn(make: Callable[[int], Batch], steps: range, processes: int, *, pinned: bool) -> Generator[Batch, None, None]:
    readers: list[_Reader] = []
    made: dict[int, _Made] = {}
    upcoming = steps.start  # the first step that nobody has been asked for

    def give_out() -> None:
        """Whoever is free takes the next step: a reader that has lost its core does not hold up the others."""
        nonlocal upcoming
        while upcoming < steps.stop and (free := [reader for reader in readers if reader.is_free]):
            min(free, key=lambda reader: len(reader.asked)).ask(upcoming)
            upcoming += 1

    try:
        for _ in range(processes):
            readers.append(_Reader(make))
        for step in steps:
            give_out()
            while step not in made and step < upcoming:
                answering = wait([reader.pipe for reader in readers if reader.asked])
                made.update(reader.take() for reader in readers if reader.pipe in answering)
                give_out()
            if step in made:
                yield made.pop(step).batch(pinned=pinned)
            else:  # every slot is in use by somebody who keeps batches
                upcoming += 1
                yield make(step)
    finally:
        for reader in readers:
            reader.end()


class _Reader:
    """A process that makes batches, and this process's end of its pipe.

    Attributes:
        asked: steps that it was asked for and has not answered, each with the number of the slot.
    """

    def __init__(self, make: Callable[[int], object]) -> None:
        self._slots = [_Slot() for _ in range(SLOTS)]
        self.asked = deque[tuple[int, int]]()
        fork = get_context("fork")  # memory without a name can only be inherited, and so can a function within a function
        self.pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(make, self._slots, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends when the reader does

    @property
    def is_free(self) -> bool:
        return len(self.asked) < ASKED_AT_ONCE and any(slot.is_free for slot in self._slots)

    def ask(self, step: int) -> None:
        free = [number for number, slot in enumerate(self._slots) if slot.is_free]
        number = max(free, key=lambda number: self._slots[number].lent_at)  # it is still in the caches
        self._slots[number].is_asked = True
        request = step, number
        self.asked.append(request)
        try:
            self.pipe.send(request)
        except ConnectionError:
            raise self._ended() from None

    def take(self) -> "tuple[int, _Made]":
        """The step that is answered, and how."""
        try:
            note = self.pipe.recv_bytes()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        step, number = self.asked.popleft()
        return step, _Made(note, self._slots[number])

    def end(self) -> None:
        self._process.kill()  # it has nothing to put in order
        self._process.join()
        self._process.close()
        self.pipe.close()

    def _ended(self) -> UserError:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        return UserError(f"a process that reads images ended {how}: if memory is short, choose fewer of them by data.workers")


@dataclass(frozen=True)
class _Made:
    """A reader's answer: a note, and the slot that it speaks of."""

    note: bytes
    slot: _Slot

    def batch(self, *, pinned: bool) -> Any:
        """The batch; an error that it ended in is raised."""
        batch = _Unpickler(io.BytesIO(self.note), self.slot.lend(), pinned=pinned).load()
        if isinstance(batch, Exception):
            raise batch
        return batch


def _serve(make: Callable[[int], object], slots: Sequence[_Slot], pipe: "Connection[Any, Any]", parent: int) -> None:
    """The life of a reader."""
    global _filling  # noqa: PLW0603
    ignore_signals_of_others()  # whoever asks them ends them
    torch.set_num_threads(1)  # those of the other process are not here
    while True:
        while not pipe.poll(SECONDS_BETWEEN_LOOKS):
            if os.getppid() != parent:
                return
        step, number = pipe.recv()
        _filling = slots[number]
        _filling.clear()
        note = io.BytesIO()
        try:
            _Pickler(note, _filling).dump(make(step))
        except UserError as error:
            note = io.BytesIO(pickle.dumps(error))
        except Exception:
            note = io.BytesIO(pickle.dumps(RuntimeError(f"in a process that reads images:\n{traceback.format_exc()}")))
        pipe.send_bytes(note.getbuffer())


class _Pickler(pickle.Pickler):
    """Of tensors it writes where they lie."""

    def __init__(self, file: io.BytesIO, slot: _Slot) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._slot = slot

    def persistent_id(self, thing: object) -> Place | None:
        return self._slot.place_of(thing) if isinstance(thing, Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: Tensor, *, pinned: bool) -> None:
        super().__init__(file)
        self._memory, self._pinned = memory, pinned

    def persistent_load(self, place: Place) -> Tensor:
        tensor = _tensor_at(self._memory, place)
        return tensor.pin_memory() if self._pinned else tensor


def _one_ahead(batches: Generator[Batch, None, None]) -> Iterator[Batch]:
    """The same, each taken by a thread while the one before is in use."""
    with closing(batches), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
