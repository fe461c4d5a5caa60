"""The token store: what the N frozen experts say of every image of a split, computed once.

A memory-mapped array ``[images, V, N, D]``, for the V stored views of each image, keyed by what it was made from.
Reading it gives float32, and where that is what is stored, to the bit what the experts would give for the same views of the same
images in the same batches.
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
from dmoe.console import progress_bar, say
from dmoe.data.base import DomainSplit
from dmoe.data.streams import stored_images
from dmoe.errors import UserError
from dmoe.models.expert_pool import ExpertPool
from dmoe.run_folder import Stage

TOKENS = "tokens.npy"
BATCHES_BETWEEN_NOTES = 20
"""How many batches a kill can cost at most."""


Storage = Literal["float32", "float16", "bfloat16"]

_KEPT_AS: dict[Storage, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""numpy knows no bfloat16; its bits are kept as whole numbers."""


class TokenStore:
    """Tokens of one split, by image number."""

    def __init__(self, array: np.ndarray) -> None:
        """
        Args:
            array: ``[images, V, N, D]`` of float32, float16, or the bits of bfloat16 as uint16.
        """
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @property
    def views(self) -> int:
        """V."""
        return int(self._array.shape[1])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` of view 0 of the images numbered ``index`` ``[B]``."""
        return _as_float32(self._array[index.numpy(), 0])

    def of_views(self, index: Tensor, view: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` of the images numbered ``index`` ``[B]``, each in its own view ``[B]``."""
        return _as_float32(self._array[index.numpy(), view.numpy()])


def bytes_a_number(storage: Storage) -> int:
    return np.dtype(_KEPT_AS[storage]).itemsize


def is_stored(stage: Stage) -> bool:
    """Whether the stage's tokens are complete and made from the same inputs."""
    return _made_from_same(stage.manifest, stage.key) and (stage.folder / TOKENS).is_file()


def build_store(
    stage: Stage,
    *,
    split: DomainSplit,
    pool: ExpertPool,
    width: int,
    batch_size: int,
    device: torch.device,
    storage: Storage = "float32",
    views: int = 1,
    workers: int = 0,
) -> TokenStore:
    """Open the stage's tokens; compute them first, or those still missing, where they were not made from the same inputs.

    Batches are consecutive images, each with all its views, ``batch_size`` of them at a time.

    Args:
        views: V, how many of the split's stored views to take.
        workers: processes that read images ahead.

    Raises:
        UserError: the disk is full, the folder cannot be written, or an image cannot be read.
    """
    path, shape = stage.folder / TOKENS, (len(split), views, len(pool), width)
    with stage.alone():
        if not is_stored(stage):
            _build(
                stage, split=split, pool=pool, shape=shape, storage=storage, batch_size=batch_size, device=device, workers=workers
            )
    return TokenStore(_open(path, shape, storage))


Shape = tuple[int, int, int, int]


def _build(
    stage: Stage,
    *,
    split: DomainSplit,
    pool: ExpertPool,
    shape: Shape,
    storage: Storage,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> None:
    path, partial = stage.folder / TOKENS, stage.folder / "partial.json"
    cpu_began = time.process_time()
    stage.manifest.unlink(missing_ok=True)
    count, views = shape[:2]
    first = 0  # counted in views: image i in view v is number i * views + v
    if _made_from_same(partial, stage.key) and path.is_file():
        first = int(read_json(partial)["views"])
    try:
        array = _open(path, shape, storage, mode="r+") if first else _create(path, shape, storage)
        flat = array.reshape(count * views, *shape[2:])
        batches = torch.arange(first, count * views).split(batch_size)
        numbers, seen = [b // views for b in batches], [b % views for b in batches]
        images = stored_images(split, numbers, views=seen, workers=workers, device=device)
        ask = _Asking(pool)
        with progress_bar(stage.name, total=count * views, start=first, unit="image") as bar:
            for done, (index, batch) in enumerate(zip(batches, images, strict=True), start=1):
                flat[index[0] : index[-1] + 1] = _to_store(ask(batch), storage)
                bar.update(len(index))
                if done % BATCHES_BETWEEN_NOTES == 0:
                    array.flush()
                    write_json(partial, {"key": stage.key, "views": int(index[-1]) + 1})
        array.flush()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); it needs {bytes_a_number(storage) * np.prod(shape) / 2**20:.0f} MiB"
        ) from error
    figures = {"images": count * views - first, "cpu_seconds": time.process_time() - cpu_began}
    write_json(stage.manifest, {"key": stage.key, "inputs": dict(stage.inputs), "figures": figures})
    partial.unlink(missing_ok=True)


def _made_from_same(path: Path, key: str) -> bool:
    return path.is_file() and read_json(path).get("key") == key


class _Asking:
    """Asks all experts, for as many images at a time as fit into a GPU's memory."""

    def __init__(self, pool: ExpertPool) -> None:
        self._pool = pool
        self._at_once: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``."""
        while True:
            at_once = self._at_once or len(images)
            try:
                with torch.inference_mode():
                    return torch.cat([self._pool(part) for part in images.split(at_once)])
            except torch.OutOfMemoryError as error:
                if at_once == 1:
                    raise UserError(
                        "tokens.batch_size: the GPU's memory is too small for one image; --gpu -1 works without"
                    ) from error
                self._at_once = at_once // 2
                say(f"tokens: {at_once} images at a time do not fit into the GPU's memory; going on with {self._at_once}")


def _to_store(tokens: Tensor, storage: Storage) -> np.ndarray:
    if storage == "float32":
        return tokens.cpu().numpy()
    kept = tokens.to(getattr(torch, storage)).cpu()
    if not bool(kept.isfinite().all()):
        raise UserError(f"tokens.storage: {storage} cannot hold tokens as large as {float(tokens.abs().max()):.3g}: use float32")
    return kept.view(torch.uint16).numpy() if storage == "bfloat16" else kept.numpy()


def _as_float32(kept: np.ndarray) -> Tensor:
    tokens = torch.from_numpy(kept)
    return (tokens.view(torch.bfloat16) if tokens.dtype == torch.uint16 else tokens).float()


def _create(path: Path, shape: Shape, storage: Storage) -> np.memmap:
    array = open_memmap(path, mode="w+", dtype=_KEPT_AS[storage], shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full says so now; through the map it would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _open(path: Path, shape: Shape, storage: Storage, mode: Literal["r", "r+"] = "r") -> np.memmap:
    try:
        array = open_memmap(path, mode=mode)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}): delete {path.parent} to make it again") from None
    if array.shape != shape or array.dtype != _KEPT_AS[storage]:
        found = f"{array.shape} {array.dtype}"
        raise UserError(
            f"{path}: holds {found}, expected {shape} {np.dtype(_KEPT_AS[storage])}: delete {path.parent} to make it again"
        )
    return array
