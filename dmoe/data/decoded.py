"""Images as they were decoded, kept on the disk, so that each is decoded once and not in every epoch of every stage.

One sparse file holds a row for each image of a data set: a seal and the pixels. The seal is a sum over the pixels and over the
name, size and time of the file that they were decoded from. A row that its seal does not fit, because it was never written, a
kill or a crash came in between, somebody writes it just now, the disk has lost it or the image has changed, is decoded again.
So there is nothing to lock, to note or to repair: any number of processes read and fill the file at once, and whatever becomes of
it the pixels are those of the image.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from dmoe.data.transforms import ImageTransform
from dmoe.reading import open_regular

SEAL_BYTES = 8
SPARED = 0.05
"""The part of the disk that is left free."""


@dataclass(frozen=True)
class Keeping:
    """Whether and where decoded images are kept.

    Attributes:
        folder: of the files, one a data set and image size.
        limit: bytes on the disk that such a file may take; images beyond it are decoded each time.
        fills: whether images are added; those that are there are used in any case.
    """

    folder: Path
    limit: int
    fills: bool = True


class DecodedImages:
    """The pixels of a data set's images, upright and uncropped."""

    def __init__(self, keeping: Keeping, *, root: Path, paths: Sequence[str], transform: ImageTransform) -> None:
        """
        Args:
            paths: of all images, below ``root``; row i is of the i-th.
        """
        channels, height, width = transform.image_shape
        self._pixel_bytes = channels * height * width * (4 if transform.takes_bands else 1)
        self._count, self._limit, self._fills = len(paths), keeping.limit, keeping.fills
        decoder = (PIL.__version__, features.version("jpg"))  # another one may round otherwise
        key = hashlib.sha256(repr((str(root.absolute()), transform.image_shape, decoder)).encode())
        key.update("\n".join(paths).encode(errors="surrogateescape"))
        self.path = keeping.folder / f"{key.hexdigest()[:16]}.pixels"

    @property
    def bytes_at_most(self) -> int:
        """What they will take: all of them, or as many as may be kept."""
        return min(self._limit, self._count * (SEAL_BYTES + self._pixel_bytes))

    @property
    def bytes_there(self) -> int:
        """What the images that are kept take."""
        try:
            return self.path.stat().st_blocks * 512
        except (OSError, ValueError):
            return 0

    def fill(self, place: np.ndarray, *, row: int, path: bytes, decode: Callable[[], np.ndarray]) -> None:
        """Put an image into ``place`` ``[H, W, C]``: the row that is kept, or what ``decode`` makes of its file, to be kept.

        Raises:
            Whatever ``decode`` raises.
        """
        stamp = _stamp(path)
        if not self._read(row, stamp, place):
            place[:] = decode()
            self._write(row, stamp, place)

    def _read(self, row: int, stamp: int, place: np.ndarray) -> bool:
        file = self._file
        if file is None:
            return False
        begin = row * (SEAL_BYTES + self._pixel_bytes)
        try:
            seal = int.from_bytes(os.pread(file.fileno(), SEAL_BYTES, begin))
            if seal == 0:  # nothing was ever written here
                return False
            # Read, not mapped: a whole row at a time without a page fault, and a disk that fails is an error, not a signal.
            read = os.preadv(file.fileno(), [place.data], begin + SEAL_BYTES)
        except OSError:
            return False
        return read == self._pixel_bytes and seal == _seal(place, stamp)

    def _write(self, row: int, stamp: int, place: np.ndarray) -> None:
        file = self._file
        if file is None or not self._fills:
            return
        try:
            disk = os.fstatvfs(file.fileno())
            taken = os.fstat(file.fileno()).st_blocks * 512 + self._pixel_bytes
            if taken > self._limit or disk.f_bavail < SPARED * disk.f_blocks:
                self._fills = False
            else:
                seal = _seal(place, stamp).to_bytes(SEAL_BYTES)
                os.pwritev(file.fileno(), [seal, place.data], row * (SEAL_BYTES + self._pixel_bytes))
        except OSError:  # a full disk, or a quota
            self._fills = False

    @cached_property
    def _file(self) -> FileIO | None:
        """Opened when it is first needed; None where there is none and none can be made."""
        if self._fills:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return open(
                    self.path,
                    "r+b",
                    buffering=0,
                    opener=lambda path, flags: os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666),
                )
            except (OSError, ValueError):  # no such name is possible
                self._fills = False
        try:
            return open_regular(self.path, at_most=1 << 62)
        except (OSError, ValueError):
            return None


def _stamp(path: bytes) -> int:
    """Changes with the name of a file and, as far as its size and time tell, with its content."""
    try:
        state = os.stat(path)  # noqa: PTH116 - a Path would take as long as the rest
    except (OSError, ValueError):  # decoding will say so
        return 0
    facts = repr((path, state.st_size, state.st_mtime_ns)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(facts, digest_size=SEAL_BYTES).digest())


def _seal(pixels: np.ndarray, stamp: int) -> int:
    """A sum over 64-bit words: as fast as reading them, and wrong wherever a part was not written."""
    flat = pixels.reshape(-1).view(np.uint8)
    words = len(flat) // 8 * 8
    total = int(flat[:words].view(np.uint64).sum()) + int(flat[words:].sum()) + stamp
    return total % (1 << 8 * SEAL_BYTES)
