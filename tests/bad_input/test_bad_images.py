"""Broken pictures and pictures made to break what reads them: told by name, or left out where that was asked for."""

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from doors import changes, make_pictures, refusal, state
from PIL import Image

from dmoe.config import DataConfig
from dmoe.data.base import DomainDataset
from dmoe.data.files import LARGEST_PICTURE, read_pixels
from dmoe.data.registry import Opening, load_dataset
from dmoe.data.transforms import ImageTransform
from dmoe.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)


def _saved(kind: str, mode: str = "RGB", *, pixels: np.ndarray = NOISE, **options: object) -> bytes:
    content, picture = io.BytesIO(), Image.fromarray(pixels)
    (picture if picture.mode == mode else picture.convert(mode)).save(content, kind, **options)
    return content.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *more: bytes, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file of whatever size it claims."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _sized_jpeg(width: int, height: int) -> bytes:
    content = bytearray(_saved("JPEG"))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def _sized_gif(width: int, height: int) -> bytes:
    content = bytearray(_saved("GIF", "P"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def _bmp(width: int, height: int, bits: int = 24, packing: int = 0) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, width, height, 1, bits, packing, 0, 0, 0, 0, 0)


def _flipped(content: bytes, seed: int) -> bytes:
    damaged, draw = bytearray(content), random.Random(seed)
    for _ in range(1 + seed % 8):
        damaged[draw.randrange(len(damaged) if seed % 2 else min(200, len(damaged)))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _several(kind: str) -> bytes:
    content = io.BytesIO()
    frames = [Image.fromarray(np.roll(NOISE, step)).convert("RGB") for step in range(3)]
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    return content.getvalue()


WHOLE = {
    "jpeg": _saved("JPEG"),
    "progressive": _saved("JPEG", progressive=True),
    "png": _saved("PNG"),
    "palette": _saved("PNG", "P"),
    "gif": _saved("GIF", "P"),
    "tiff": _saved("TIFF", compression="tiff_lzw"),
    "webp": _saved("WEBP"),
    "bmp": _saved("BMP"),
    "ppm": _saved("PPM"),
}
READABLE = {
    **WHOLE,
    "cmyk": _saved("JPEG", "CMYK"),
    "grey": _saved("PNG", "L"),
    "one bit": _saved("PNG", "1"),
    "transparent": _saved("PNG", "RGBA"),
    "lab": _saved("TIFF", "LAB"),
    "animated gif": _several("GIF"),
    "animated png": _several("PNG"),
    "animated webp": _several("WEBP"),
    "pages": _several("TIFF"),
    "16 bits": _png(2, 2, depth=16, colour=0, data=bytes(10)),
    "one pixel": _png(1, 1, data=bytes(4)),
}
FUZZED = {
    **{f"{name} cut to {part}": content[: int(part * len(content))] for name, content in WHOLE.items() for part in (0.05, 0.6)},
    **{f"{name} flipped {seed}": _flipped(content, seed) for name, content in WHOLE.items() for seed in range(8)},
}
BROKEN = {
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"no picture at all\n",
    "png of 2^31 pixels an edge": _png((1 << 31) - 1, (1 << 31) - 1),
    "png above both limits": _png(20_000, 20_000),
    "png between the limits": _png(10_000, 10_000),
    "png of no width": _png(0, 5),
    "png of no height": _png(5, 0),
    "png without data": _png(2000, 2000),
    "png of huge text": _png(1, 1, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28))), data=bytes(4)),
    "png of a huge chunk": _png(5, 5)[:33] + struct.pack(">I", (1 << 31) - 1) + b"IDAT" + bytes(10),
    "jpeg of 65,535 pixels an edge": _sized_jpeg(65_535, 65_535),
    "jpeg of no height": _sized_jpeg(50, 0),
    "gif of 65,535 pixels an edge": _sized_gif(65_535, 65_535),
    "bmp of 2^30 pixels an edge": _bmp(1 << 30, 1 << 30),
    "bmp of negative width": _bmp(-5, 5),
    "bmp of no such packing": _bmp(5, 5, packing=9),
    "ppm of many digits": b"P6 " + b"9" * 5000 + b" 1 255 " + bytes(10),
    "ppm of 2^30 pixels an edge": b"P6 1073741824 1073741824 255 " + bytes(10),
    "tiff of nothing": b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + bytes(4),
    "tiff whose list leads to itself": b"II*\0" + struct.pack("<I", 8) + struct.pack("<HHHIII", 1, 330, 4, 1, 8, 8),
    "webp of nothing": b"RIFF\x10\0\0\0WEBPVP8L" + bytes(8),
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) (w) file\nshowpage\n",
    "floating": _saved("TIFF", "F"),
    "32 bits": _saved("TIFF", "I", pixels=NOISE.view(np.uint32)[..., 0].astype(np.int32)),
}


def opened(folder: Path, **fields: object) -> DomainDataset:
    config = DataConfig.model_validate({"dir": folder, "target_domains": ["sketch"], "image_size": 8, "decoded_gb": 0, **fields})
    return load_dataset("folders", config, Opening(writes=False))


def read_all(dataset: DomainDataset) -> None:
    for split in dataset.splits.values():
        split.images(torch.arange(len(split)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "data"
    make_pictures(folder)
    return folder


@pytest.fixture
def path(pictures: Path) -> Path:
    return pictures / "photo" / "cat" / "0.png"


def _put(path: Path, content: bytes) -> None:
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("how", list(BROKEN))
def test_broken_picture_is_told_by_its_name_and_can_be_left_out(how: str, pictures: Path, path: Path) -> None:
    _put(path, BROKEN[how])
    before = state(pictures)
    told = refusal(lambda: read_all(opened(pictures)))
    assert told is not None and told.startswith(f"{path}: cannot be read as an image: ")
    assert opened(pictures, skip_unreadable=True).unreadable == ["photo/cat/0.png"]
    assert changes(before, state(pictures)) == set()


@pytest.mark.parametrize("how", list(FUZZED))
def test_damaged_picture_is_read_or_told_by_its_name(
    how: str, pictures: Path, path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    _put(path, FUZZED[how])
    told = refusal(lambda: read_all(opened(pictures)))
    left_out = opened(pictures, skip_unreadable=True).unreadable
    assert told is None or told.startswith(f"{path}: cannot be read as an image: ")
    assert left_out == ([] if told is None else ["photo/cat/0.png"])
    assert not recwarn.list


@pytest.mark.parametrize("how", list(READABLE))
def test_unusual_picture_is_read(how: str, pictures: Path, path: Path) -> None:
    _put(path, READABLE[how])
    assert refusal(lambda: read_all(opened(pictures))) is None
    assert refusal(lambda: read_all(opened(pictures, augmentation="crops"))) is None


def _npz(shape: tuple[int, ...], dtype: str = "float32", header: bytes | None = None) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        text = (
            header if header is not None else repr({"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}).encode()
        )
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(1000))

    return make


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w", force_zip64=True) as entry:
        text = repr({"descr": "<f4", "fortran_order": False, "shape": (8, 3072, 3072)}).encode()
        entry.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
        for _ in range(9):
            entry.write(bytes(1 << 25))


ARCHIVES: dict[str, Callable[[Path], object]] = {
    "no archive": lambda path: path.write_bytes(bytes(100)),
    "one array": lambda path: np.save(open(path, "wb"), np.zeros((8, 4, 4), dtype=np.float32)),
    "another array": lambda path: np.savez(path, y=np.zeros(3)),
    "objects": lambda path: np.savez(path, x=np.array([{}], dtype=object)),
    "texts": lambda path: np.savez(path, x=np.array(["a"])),
    "too few bands": lambda path: np.savez(path, x=np.zeros((3, 4, 4))),
    "no pixels": lambda path: np.savez(path, x=np.zeros((8, 0, 4))),
    "shape of 2^60": _npz((8, 1 << 30, 1 << 30)),
    "shape of 2^33": _npz((8, 1 << 15, 1 << 15)),
    "shape overflows": _npz((8, 1 << 62, 1 << 62)),
    "negative shape": _npz((8, -1, 5)),
    "head of brackets": _npz((), header=b"(" * 200),
    "head of signs": _npz((), header=b"-" * 9000 + b"1"),
    "head of a call": _npz((), header=b"{'descr': __import__('os').system('touch canary'), 'fortran_order': False, 'shape': (1,)}"),
    "head unhashable": _npz((), header=b"{[]: 1}"),
    "bomb": _bomb,
}


@pytest.mark.parametrize("how", list(ARCHIVES))
def test_bad_archive_of_bands_is_told(how: str, tmp_path: Path) -> None:
    path = tmp_path / "bands.npz"
    ARCHIVES[how](path)
    told = refusal(lambda: read_pixels(path, ImageTransform((8, 4, 4))))
    assert told is not None and told.startswith(f"{path}: cannot be read as an image: ")


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("how", list(SPECIAL))
def test_what_is_no_file_is_told_at_once(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    SPECIAL[how](path)
    told = refusal(lambda: read_pixels(path, ImageTransform((3, 4, 4))))
    assert told is not None and told.startswith(f"{path}: ")


def test_picture_as_large_as_is_allowed_is_not_refused_for_its_size(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for height, told in ((LARGEST_PICTURE // 10_000, False), (LARGEST_PICTURE // 10_000 + 1, True)):
        path.write_bytes(_png(10_000, height))
        with pytest.raises(UserError) as caught:
            read_pixels(path, ImageTransform((3, 4, 4)))
        assert ("pixels, more than" in str(caught.value)) is told
