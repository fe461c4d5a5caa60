"""The token store: what the N frozen experts say of every image of a split, computed once.

A memory-mapped array ``[images, V, N, D]``, for the V stored views of each image, keyed by what it was made from.
Reading it gives float32, and where that is what is stored, to the bit what the experts would give for the same views of the same
images in the same batches.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from dmoe.artifacts import cannot_write, read_json, write_json
from dmoe.console import progress_bar, say
from dmoe.data.base import DomainSplit
from dmoe.data.streams import stored_images
from dmoe.distributed import ALONE, World
from dmoe.errors import UserError
from dmoe.models.expert_pool import ExpertPool
from dmoe.reading import open_regular
from dmoe.run_folder import Stage

TOKENS = "tokens.npy"
PARTIAL = "partial"
"""Notes of what is there of a file that is not finished: ``partial.0.json`` and so on, by the process that wrote them."""

BLOCK_IMAGES = 2000
"""About how many images have a sum together; that much a kill can cost at most."""


Storage = Literal["float32", "float16", "bfloat16"]

_NO_ARRAY = (OSError, ValueError, TypeError, OverflowError, MemoryError, RecursionError, SyntaxError, TokenError)
"""What numpy ends in where the head of a file is no array's."""

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
    world: World = ALONE,
) -> TokenStore:
    """Open the stage's tokens; compute those first that are missing, damaged, or were made from other inputs.

    Batches are consecutive images, each with all its views, ``batch_size`` of them at a time. A block of batches is noted with a
    sum over its bytes when it is on disk; blocks are what a kill can cost, and what processes share.

    Args:
        views: V, how many of the split's stored views to take.
        workers: processes that read images ahead.
        world: the processes that compute them together.

    Raises:
        UserError: the disk is full, the folder cannot be written, or an image cannot be read.
    """
    path, shape = stage.folder / TOKENS, (len(split), views, len(pool), width)
    count = len(split) * views  # image i in view v is number i * views + v
    block_size = batch_size * max(1, BLOCK_IMAGES // batch_size)
    blocks = [range(begin, min(begin + block_size, count)) for begin in range(0, count, block_size)]
    with stage.alone() if world.is_first else nullcontext():
        known = world.from_first(lambda: _blocks_there(stage, shape, storage, blocks))
        missing = [number for number in range(len(blocks)) if number not in known]
        if missing:
            if known:
                say(f"tokens of {stage.name} images: going on after {len(known)} of {len(blocks)} blocks")
            cpu_began = time.process_time()
            notes, work = _Notes(stage, world, known), _Work(path, split, pool, views, batch_size, device, storage, workers)
            images = sum(len(blocks[number]) for number in missing)
            try:
                with progress_bar(stage.name, total=count, start=count - images, unit="image") as bar:
                    work.do({number: blocks[number] for number in world.share(missing)}, done=notes.add, step=bar.update)
            except OSError as error:
                raise cannot_write(path, error) from error
            world.wait()
            everywhere = world.gathered(notes.sums)
            if world.is_first:
                sums = known | {number: digest for sums in everywhere for number, digest in sums.items()}
                _finish(stage, sums, figures={"images": images, "cpu_seconds": time.process_time() - cpu_began})
        world.wait()
    return TokenStore(_open(path, shape, storage))


Shape = tuple[int, int, int, int]
Sums = dict[int, str]
"""Of blocks, by their numbers."""


class _Notes:
    """What this process has computed, noted so that a kill does not cost it."""

    def __init__(self, stage: Stage, world: World, known: Sums) -> None:
        self._stage, self._path, self._known = stage, stage.folder / f"{PARTIAL}.{world.rank}.json", known if world.is_first else {}
        self.sums: Sums = {}

    def add(self, block: int, digest: str) -> None:
        self.sums[block] = digest
        write_json(self._path, _note(self._stage, self._known | self.sums))


def _note(stage: Stage, sums: Sums) -> dict[str, object]:
    return {"key": stage.key, "sha256": {str(number): digest for number, digest in sums.items()}}


def _blocks_there(stage: Stage, shape: Shape, storage: Storage, blocks: Sequence[range]) -> Sums:
    """The blocks of a file that is begun, or finished, from the same inputs, as far as they are whole. Begins one otherwise."""
    path = stage.folder / TOKENS
    finished = is_stored(stage)
    noted: Sums = {}
    for note in [stage.manifest] if finished else sorted(stage.folder.glob(f"{PARTIAL}.*.json")):
        if path.is_file() and _made_from_same(note, stage.key):
            noted |= _sums_of(note)
    if not finished:
        stage.manifest.unlink(missing_ok=True)
    if not noted:
        try:
            _create(path, shape, storage)
        except OSError as error:
            raise cannot_write(path, error) from error
        return {}
    flat = _open(path, shape, storage).reshape(-1, *shape[2:])
    whole = {n: digest for n, digest in noted.items() if n < len(blocks) and _digest(flat[_slice(blocks[n])]) == digest}
    if len(whole) < len(noted):
        say(f"{stage.name}: {len(noted) - len(whole)} of {len(blocks)} blocks of {path} are damaged; they are computed again")
    if not finished:  # under one name, whoever wrote them
        for note in stage.folder.glob(f"{PARTIAL}.*.json"):
            note.unlink()
        write_json(stage.folder / f"{PARTIAL}.0.json", _note(stage, whole))
    elif len(whole) < len(blocks):
        write_json(stage.folder / f"{PARTIAL}.0.json", _note(stage, whole))
        stage.manifest.unlink()
    return whole


def _finish(stage: Stage, sums: Sums, *, figures: Mapping[str, float]) -> None:
    write_json(stage.manifest, {**_note(stage, sums), "inputs": dict(stage.inputs), "figures": figures})
    for note in stage.folder.glob(f"{PARTIAL}.*.json"):
        note.unlink()


def _made_from_same(path: Path, key: str) -> bool:
    return path.exists() and read_json(path).get("key") == key


def _sums_of(path: Path) -> Sums:
    try:
        noted = {int(number): str(digest) for number, digest in read_json(path)["sha256"].items()}
        return {number: digest for number, digest in noted.items() if number >= 0}
    except (KeyError, ValueError, AttributeError):  # none were noted then
        return {}


def _slice(block: range) -> slice:
    return slice(block.start, block.stop)


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data.cast("B")).hexdigest()


@dataclass(frozen=True)
class _Work:
    """Computing blocks of a file that is there."""

    path: Path
    split: DomainSplit
    pool: ExpertPool
    views: int
    batch_size: int
    device: torch.device
    storage: Storage
    workers: int

    def do(self, blocks: Mapping[int, range], *, done: Callable[[int, str], None], step: Callable[[int], object]) -> None:
        """Compute the blocks, by their numbers; ``done`` is told of each, with its sum, when it is on disk, ``step`` of each batch.

        Written, not mapped: a disk that fails is an error, not a signal, and other machines' parts of a page are left alone.
        """
        batches = [(number, batch) for number, block in blocks.items() for batch in torch.tensor(block).split(self.batch_size)]
        images = stored_images(
            self.split,
            [batch // self.views for _, batch in batches],
            views=[batch % self.views for _, batch in batches],
            workers=self.workers,
            device=self.device,
        )
        ask = _Asking(self.pool)
        begin = int(open_memmap(self.path, mode="r").offset)
        with open(self.path, "r+b", buffering=0) as file:
            sum_ = hashlib.sha256()
            for (number, batch), pixels in zip(batches, images, strict=True):
                rows = np.ascontiguousarray(_to_store(ask(pixels), self.storage))
                sum_.update(rows.data.cast("B"))
                _write_at(file.fileno(), rows, begin + int(batch[0]) * (rows.nbytes // len(rows)))
                step(len(batch))
                if int(batch[-1]) == blocks[number][-1]:
                    os.fsync(file.fileno())
                    done(number, sum_.hexdigest())
                    sum_ = hashlib.sha256()


def _write_at(file: int, rows: np.ndarray, place: int) -> None:
    left = rows.data.cast("B")
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


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


def _create(path: Path, shape: Shape, storage: Storage) -> None:
    path.unlink(missing_ok=True)  # not into what a link leads to
    open_memmap(path, mode="w+", dtype=_KEPT_AS[storage], shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full says so now, not after hours
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _open(path: Path, shape: Shape, storage: Storage) -> np.memmap:
    try:
        open_regular(path, at_most=1 << 62).close()
        array = open_memmap(path, mode="r")
    except _NO_ARRAY as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}): delete {path.parent} to make it again") from None
    if array.shape != shape or array.dtype != _KEPT_AS[storage]:
        found = f"{array.shape} {array.dtype}"
        raise UserError(
            f"{path}: holds {found}, expected {shape} {np.dtype(_KEPT_AS[storage])}: delete {path.parent} to make it again"
        )
    return array
