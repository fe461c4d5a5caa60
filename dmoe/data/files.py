"""Images that lie in files, read each time they are asked for."""

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from tokenize import TokenError

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.data.decoded import DecodedImages
from dmoe.data.readers import empty
from dmoe.data.streams import stream
from dmoe.data.transforms import TURNS, Augmentation, ImageTransform, random_crop, random_views, turn
from dmoe.errors import UserError
from dmoe.reading import open_regular

SCANNED_AT_ONCE = 64

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "MPO", "TGA")
"""What pictures may be, whatever their names say. Of what Pillow knows besides, some start other programs."""

LARGEST_FILE = 1 << 29
"""Bytes of a file."""

LARGEST_PICTURE = 89_478_485
"""Pixels, Pillow's own bound, from which on it warns of a bomb; a picture of that size takes about a gigabyte while it is read."""

LARGEST_BANDS = 1 << 28
"""Bytes of an archive's array."""

_UNREADABLE = (
    OSError,
    SyntaxError,  # a broken PNG
    ValueError,
    EOFError,
    LookupError,  # an archive without the array
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    TokenError,  # the head of an array
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,  # an archive that is encrypted, or packed in another way
    Image.DecompressionBombError,
)
"""What Pillow and numpy end in where a file is broken, or made to break them."""


class ImageFiles(DomainSplit):
    """One file an image: pictures that Pillow reads, or ``.npz`` archives that hold bands ``[C, H, W]`` as ``x``."""

    def __init__(
        self,
        *,
        root: Path,
        paths: Sequence[str],
        labels: Tensor,
        domains: Tensor,
        domain_names: Mapping[int, str],
        transform: ImageTransform,
        group_domains: Tensor | None = None,
        group_names: Mapping[int, str] | None = None,
        augmentation: Augmentation = "none",
        decoded: DecodedImages | None = None,
        rows: Sequence[int] = (),
    ) -> None:
        """
        Args:
            paths: below ``root``, one an image.
            augmentation: of fresh draws. ``turns`` are stored views too, all eight.
            decoded: where decoded images are kept, if they are; ``rows`` says in which row each image.
        """
        self._root, self._transform, self._augmentation = os.fsencode(root), transform, augmentation
        # One array of bytes: worker processes share it, where a list of strings would be copied to each, bit by bit.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.domains, self.domain_names = labels, domains, domain_names
        self.group_domains = domains if group_domains is None else group_domains
        self._group_names = domain_names if group_names is None else group_names
        self.views = TURNS if augmentation == "turns" else 1
        self._decoded, self._rows = decoded, np.array(rows, dtype=np.int64)

    @property
    def group_names(self) -> Mapping[int, str]:
        return self._group_names

    def path(self, number: int) -> Path:
        """The file of an image."""
        return Path(os.fsdecode(self._name(number)))

    def name(self, number: int) -> str:
        return str(self.path(number))

    def _name(self, number: int) -> bytes:
        below: bytes = self._paths[number]
        return os.path.join(self._root, below)  # noqa: PTH118 - a Path would take as long as a tenth of a small picture

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self.finish(self.pixels(index, view=view, draw=draw))

    def pixels(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        """``[B, H, W, C]``, uint8; of bands, float32."""
        if self._augmentation == "turns" and draw is not None:
            view = random_views(len(index), TURNS, draw)
        crop = draw if self._augmentation == "crops" else None
        channels, height, width = self._transform.image_shape
        batch = empty((len(index), height, width, channels), torch.float32 if self._transform.takes_bands else torch.uint8)
        for place, number in zip(batch.numpy(), index.tolist(), strict=True):
            name = self._name(number)
            decode = partial(read_pixels, name, self._transform, draw=crop, slot=number)
            if self._decoded is None or crop is not None:
                place[:] = decode()
            else:
                self._decoded.fill(place, row=int(self._rows[number]), path=name, decode=decode)
        if view is not None and self.views > 1:
            turn(batch, view)
        return batch

    def finish(self, pixels: Tensor) -> Tensor:
        return self._transform.finish(pixels)


def read_pixels(path: Path | bytes, transform: ImageTransform, *, draw: int | None = None, slot: int = 0) -> np.ndarray:
    """The pixels of a file, see :meth:`ImageTransform.pixels`; cropped at random by ``draw`` and ``slot``, where there is one.

    Raises:
        UserError: there is no such file, or it is not a whole picture of the right kind, or larger than
            :data:`LARGEST_PICTURE`.
    """
    try:
        with open_regular(path, at_most=LARGEST_FILE) as file:
            content = io.BytesIO(file.read())  # in one go: Pillow would read a little at a time
        if os.fsencode(path).endswith(b".npz"):
            return transform.pixels(_bands(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd in a picture that can be read
            picture: Image.Image = Image.open(content, formats=FORMATS)
            if picture.width * picture.height > LARGEST_PICTURE:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {LARGEST_PICTURE:,}")
            if draw is not None:
                picture = random_crop(picture, transform.image_shape[1:], draw, slot)
            return transform.pixels(picture)
    except FileNotFoundError:
        raise UserError(f"{os.fsdecode(path)}: no such image; data.skip_unreadable=true leaves such images out") from None
    except _UNREADABLE as error:
        told = " ".join(str(error).split())[:200]
        if isinstance(error, UnidentifiedImageError):
            told = "it is of no known kind"
        elif isinstance(error, OSError) and error.filename is not None:
            told = error.strerror or told
        why = f"cannot be read as an image: {told or type(error).__name__}"
        raise UserError(f"{os.fsdecode(path)}: {why}; mend or delete it, or let data.skip_unreadable=true leave it out") from None


def _bands(content: io.BytesIO) -> np.ndarray:
    archive = np.load(content, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("is one array, not an archive of them")
    with archive:
        entries = archive.zip.infolist() if archive.zip is not None else []
        size = max((entry.file_size for entry in entries), default=0)
        if size > LARGEST_BANDS:
            raise ValueError(f"unpacks to {size:,} bytes, more than {LARGEST_BANDS:,}")
        bands: np.ndarray = archive["x"]
        return bands


def missing(root: Path, paths: Sequence[str]) -> list[int]:
    """Numbers of the paths below ``root`` that are not there; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    absent = []
    for number, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = {entry.name for entry in (root / folder).iterdir()}
            except (OSError, ValueError):  # no such folder, or no name that one could have
                listed[folder] = set()
        if name not in listed[folder]:
            absent.append(number)
    return absent


def unreadable(root: Path, paths: Sequence[str], transform: ImageTransform, *, workers: int) -> list[str]:
    """Those of the paths below ``root`` that :func:`read_pixels` cannot read; reads every one of them."""
    parts = [paths[begin : begin + SCANNED_AT_ONCE] for begin in range(0, len(paths), SCANNED_AT_ONCE)]
    found = stream(partial(_unreadable_of, root, parts, transform), start=0, stop=len(parts), workers=workers)
    return [path for bad in found for path in bad]


def _unreadable_of(root: Path, parts: Sequence[Sequence[str]], transform: ImageTransform, number: int) -> list[str]:
    bad = []
    for path in parts[number]:
        try:
            read_pixels(root / PurePosixPath(path), transform)
        except UserError:
            bad.append(path)
    return bad


def kept(count: int, left_out: Sequence[int]) -> Tensor:
    """The numbers below ``count`` that are not left out, ascending."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[torch.tensor(list(left_out), dtype=torch.int64)] = False
    return torch.where(keep)[0]
