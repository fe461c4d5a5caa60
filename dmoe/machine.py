"""What this machine has to compute with."""

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

from dmoe.errors import UserError


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """What computes here: the name of the GPU, or of the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_folder() -> Path | None:
    """Where this machine's user keeps what can be made again; None where nothing can be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def keep_freed_memory() -> None:
    """Have this process and its children keep memory that is freed, instead of giving it back and asking for it again.

    Large tensors come and go at every step; with glibc's defaults most of their cost is the system handing out fresh pages.
    Elsewhere than with glibc nothing happens.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def end_with(parent: int) -> None:
    """Have the system ask this process to end (SIGTERM) when its parent does, however that ends, as it does where it has already.

    Elsewhere than on Linux nothing happens.

    Args:
        parent: the process that started this one.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # of prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before this process had said so
        os.kill(os.getpid(), signal.SIGTERM)


def choose_device(gpu: int | None, *, number: int = 0) -> str:
    """The device of ``--gpu``: that GPU, none for -1, and what there is where it was left out.

    Args:
        number: of this process among those of a machine, each of which takes a GPU of its own.

    Raises:
        UserError: no such GPU.
    """
    import torch

    if gpu is None:
        gpu = number if torch.cuda.is_available() else -1
    if gpu < 0:
        return "cpu"
    if gpu >= torch.cuda.device_count():
        raise UserError(f"--gpu: no GPU {gpu} here, {torch.cuda.device_count()} visible; --gpu -1 runs without one")
    torch.cuda.set_device(gpu)
    torch.backends.cudnn.deterministic = True  # the same seed, the same numbers
    torch.backends.cudnn.benchmark = False
    return f"cuda:{gpu}"
