"""How much memory a piece of work takes at its peak, and how much there is."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OF_A_GPU, OF_A_MACHINE = 0.8, 0.5
"""Parts of all memory that one process takes unless it is told otherwise: a GPU is ours, a machine serves others too."""


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that exist at once at the most while ``work`` runs, beside those that were there before.

    Counted, not sampled: the same work gives the same number. What operators take for themselves for a moment is part of it
    on GPUs only.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    live = _LiveBytes()
    with live:
        work()
    return live.peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory to be had, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # on a CPU it has no class of its own
    )


def memory_budget(device: torch.device) -> int:
    """Bytes that one process should get along with on a device: a fixed part of what it has, not of what is free just now."""
    if device.type == "cuda":
        return int(OF_A_GPU * torch.cuda.get_device_properties(device).total_memory)
    return int(OF_A_MACHINE * _machine_bytes())


def _machine_bytes() -> int:
    """Of this machine, or of the container that this process is confined to."""
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return everything
    return min(everything, int(limit)) if limit.isdecimal() else everything


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that operators make until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
