"""The token store: what the N frozen experts say of every image of a split, computed once.

A memory-mapped array ``[images, N, D]`` of float32, keyed by what it was made from. Reading it gives, to the bit, what the
experts would give for the stored view of the same images in the same batches.
"""

import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from dmoe.artifacts import read_json, write_json
from dmoe.console import progress_bar
from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.models.expert_pool import ExpertPool
from dmoe.run_folder import Stage

TOKENS = "tokens.npy"
BATCHES_BETWEEN_NOTES = 20
"""How many batches a kill can cost at most."""


class TokenStore:
    """Tokens of one split, by image number."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` of the images numbered ``index`` ``[B]``."""
        return torch.from_numpy(self._array[index.numpy()])


def is_stored(stage: Stage) -> bool:
    """Whether the stage's tokens are complete and made from the same inputs."""
    return _made_from_same(stage.manifest, stage.key) and (stage.folder / TOKENS).is_file()


def build_store(
    stage: Stage, *, split: DomainSplit, pool: ExpertPool, width: int, batch_size: int, device: torch.device
) -> TokenStore:
    """Open the stage's tokens; compute them first, or those still missing, where they were not made from the same inputs.

    Batches are consecutive images, ``batch_size`` at a time.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path, shape = stage.folder / TOKENS, (len(split), len(pool), width)
    with stage.alone():
        if not is_stored(stage):
            _build(stage, split=split, pool=pool, shape=shape, batch_size=batch_size, device=device)
    return TokenStore(_open(path, shape))


def _build(
    stage: Stage, *, split: DomainSplit, pool: ExpertPool, shape: tuple[int, int, int], batch_size: int, device: torch.device
) -> None:
    path, partial = stage.folder / TOKENS, stage.folder / "partial.json"
    cpu_began = time.process_time()
    stage.manifest.unlink(missing_ok=True)
    first = 0
    if _made_from_same(partial, stage.key) and path.is_file():
        first = int(read_json(partial)["images"])
    try:
        array = _open(path, shape, mode="r+") if first else _create(path, shape)
        with progress_bar(stage.name, total=len(split), start=first, unit="image") as bar:
            for count, index in enumerate(torch.arange(first, len(split)).split(batch_size), start=1):
                tokens = pool(split.images(index).to(device)).cpu()
                array[index[0] : index[-1] + 1] = tokens.numpy()
                bar.update(len(index))
                if count % BATCHES_BETWEEN_NOTES == 0:
                    array.flush()
                    write_json(partial, {"key": stage.key, "images": int(index[-1]) + 1})
        array.flush()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); it needs {4 * np.prod(shape) / 2**20:.0f} MiB") from error
    figures = {"images": len(split) - first, "cpu_seconds": time.process_time() - cpu_began}
    write_json(stage.manifest, {"key": stage.key, "inputs": dict(stage.inputs), "figures": figures})
    partial.unlink(missing_ok=True)


def _made_from_same(path: Path, key: str) -> bool:
    return path.is_file() and read_json(path).get("key") == key


def _create(path: Path, shape: tuple[int, int, int]) -> np.memmap:
    array = open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full says so now; through the map it would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _open(path: Path, shape: tuple[int, int, int], mode: Literal["r", "r+"] = "r") -> np.memmap:
    try:
        array = open_memmap(path, mode=mode)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}): delete {path.parent} to make it again") from None
    if array.shape != shape or array.dtype != np.float32:
        found = f"{array.shape} {array.dtype}"
        raise UserError(f"{path}: holds {found}, expected {shape} float32: delete {path.parent} to make it again")
    return array
