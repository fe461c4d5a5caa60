"""Images as they were decoded, kept on the disk: the same pixels, whatever becomes of the file."""

import errno
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmoe.config import DataConfig
from dmoe.data import files
from dmoe.data.decoded import SEAL_BYTES, DecodedImages, Keeping
from dmoe.data.files import ImageFiles
from dmoe.data.registry import Opening, load_dataset
from dmoe.data.streams import stream
from dmoe.data.transforms import Augmentation, ImageTransform
from dmoe.errors import UserError

COUNT, SIDE = 12, 40
RGB, GREY, BANDS = ImageTransform((3, SIDE, SIDE)), ImageTransform((1, 15, 15)), ImageTransform((4, SIDE, SIDE))
ALL = torch.arange(COUNT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pictures, and of bands."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = random.integers(0, 256, (SIDE + 5, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        np.savez(tmp_path / f"{number}.npz", x=random.normal(size=(4, SIDE, SIDE)))
    return tmp_path


def split_of(
    root: Path, *, limit: int = 10**9, fills: bool = True, transform: ImageTransform = RGB, augmentation: Augmentation = "none"
) -> tuple[ImageFiles, DecodedImages]:
    """All images, in the reverse of the order in which they are kept."""
    paths = [f"{number}.{'npz' if transform.takes_bands else 'png'}" for number in range(COUNT)]
    decoded = DecodedImages(Keeping(root / "kept", limit, fills), root=root, paths=paths, transform=transform)
    zeros = torch.zeros(COUNT, dtype=torch.int64)
    split = ImageFiles(
        root=root,
        paths=paths[::-1],
        labels=zeros,
        domains=zeros,
        domain_names={0: "a"},
        transform=transform,
        augmentation=augmentation,
        decoded=decoded,
        rows=range(COUNT)[::-1],
    )
    return split, decoded


def decoded_anew(root: Path, **options: Any) -> Tensor:
    return split_of(root, limit=0, **options)[0].pixels(ALL)


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from now on."""
    names: list[str] = []
    read = files.read_pixels

    def noted(path: bytes, *others: Any, **options: Any) -> np.ndarray:
        names.append(Path(os.fsdecode(path)).name)
        return read(path, *others, **options)

    monkeypatch.setattr(files, "read_pixels", noted)
    return names


@pytest.mark.parametrize("transform", [RGB, GREY, BANDS])
def test_pixels_are_those_of_decoding_and_no_image_is_decoded_twice(
    root: Path, transform: ImageTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded_anew(root, transform=transform)
    names = opened(monkeypatch)
    split, _ = split_of(root, transform=transform)
    assert torch.equal(split.pixels(ALL), expected)
    assert len(names) == COUNT
    assert torch.equal(split.pixels(ALL.flip(0)), expected.flip(0))
    assert torch.equal(split_of(root, transform=transform)[0].pixels(ALL), expected)
    assert len(names) == COUNT


def test_turns_are_made_of_what_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ALL % 8
    expected = [split_of(root, limit=0, augmentation="turns")[0].pixels(ALL, **asked) for asked in ({"view": view}, {"draw": 3})]
    split, _ = split_of(root, augmentation="turns")
    split.pixels(ALL)
    names = opened(monkeypatch)
    assert torch.equal(split.pixels(ALL, view=view), expected[0])
    assert torch.equal(split.pixels(ALL, draw=3), expected[1])
    assert names == []


def test_crops_are_made_from_the_files_and_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, decoded = split_of(root, augmentation="crops")
    names = opened(monkeypatch)
    assert not torch.equal(split.pixels(ALL, draw=1), split.pixels(ALL, draw=2))
    assert len(names) == 2 * COUNT
    assert decoded.bytes_there == 0
    assert torch.equal(split.pixels(ALL), decoded_anew(root))


def test_an_image_that_has_changed_is_decoded_again(root: Path) -> None:
    split, _ = split_of(root)
    before = split.pixels(ALL)
    path = split.path(3)
    state = path.stat()
    content = path.read_bytes()
    Image.new("RGB", (SIDE, SIDE), (9, 8, 7)).save(path)
    assert (split.pixels(torch.tensor([3])) == torch.tensor([9, 8, 7])).all()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # of the same size; only the time tells
    assert torch.equal(split.pixels(ALL), before)


def test_an_image_that_is_gone_is_missed_though_its_pixels_are_kept(root: Path) -> None:
    split, _ = split_of(root)
    split.pixels(ALL)
    split.path(0).unlink()
    with pytest.raises(UserError, match="no such image"):
        split.pixels(ALL)


def damage(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "cut":
        os.truncate(path, size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        with open(path, "r+b") as file:
            file.seek(SEAL_BYTES + 100 if how == "zeros" else 0)
            file.write(bytes(size // 2) if how == "zeros" else os.urandom(size))


@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "noise"])
def test_what_is_damaged_is_decoded_again_and_mended(root: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split, decoded = split_of(root)
    expected = split.pixels(ALL)
    damage(decoded.path, how)
    names = opened(monkeypatch)
    assert torch.equal(split.pixels(ALL), expected)
    found = len(names)
    assert COUNT // 2 <= found <= COUNT
    assert torch.equal(split_of(root)[0].pixels(ALL), expected)
    assert len(names) == found


def test_no_more_is_kept_than_the_limit_says(root: Path) -> None:
    limit = 6 * 4096
    split, decoded = split_of(root, limit=limit)
    assert torch.equal(split.pixels(ALL), decoded_anew(root))
    assert 0 < decoded.bytes_there <= limit
    assert decoded.bytes_at_most == limit


def test_what_is_kept_is_used_where_nothing_may_be_added(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_of(root)[0].pixels(ALL[:5])
    names = opened(monkeypatch)
    for _ in range(2):
        split_of(root, fills=False)[0].pixels(ALL)
    assert len(names) == 2 * (COUNT - 5)


def test_nothing_is_written_where_nothing_may_be_added(root: Path) -> None:
    split_of(root, fills=False)[0].pixels(ALL)
    assert not (root / "kept").exists()


def test_a_full_disk_costs_nothing_but_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    split, decoded = split_of(root)
    monkeypatch.setattr(os, "pwritev", full)
    expected = decoded_anew(root)
    assert torch.equal(split.pixels(ALL), expected)
    assert torch.equal(split.pixels(ALL), expected)
    assert decoded.bytes_there == 0


def test_a_twentieth_of_the_disk_is_left_free(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_blocks, f_bavail = 1000, 49

    split, decoded = split_of(root)
    monkeypatch.setattr(os, "fstatvfs", lambda _: Disk)
    split.pixels(ALL)
    assert decoded.bytes_there == 0
    Disk.f_bavail = 51
    split_of(root)[0].pixels(ALL)
    assert decoded.bytes_there > 0


def test_a_folder_that_cannot_be_written_is_done_without(root: Path) -> None:
    (root / "kept").write_text("a file in its place", encoding="utf-8")
    assert torch.equal(split_of(root)[0].pixels(ALL), decoded_anew(root))


def test_processes_fill_it_side_by_side(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, _ = split_of(root)
    expected = decoded_anew(root)
    streams = [stream(lambda step: split.pixels(ALL.roll(step)), start=0, stop=6, workers=2) for _ in range(2)]
    for step, (one, other) in enumerate(zip(*streams, strict=True)):
        assert torch.equal(one, expected.roll(step, 0))
        assert torch.equal(other, expected.roll(step, 0))
    names = opened(monkeypatch)
    assert torch.equal(split.pixels(ALL), expected)
    assert names == []


def _fill_for_ever(root: Path) -> None:
    while True:
        split, decoded = split_of(root)
        split.pixels(ALL)
        decoded.path.unlink()


def test_a_kill_at_any_moment_leaves_it_right(root: Path) -> None:
    expected = decoded_anew(root)
    for _ in range(10):
        process = get_context("fork").Process(target=_fill_for_ever, args=(root,))
        process.start()
        time.sleep(0.03 * np.random.default_rng().random())
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert torch.equal(split_of(root)[0].pixels(ALL), expected)


def tree(root: Path) -> Path:
    """Pictures in folders ``domain/class``."""
    for number in range(COUNT):
        folder = root / f"domain{number % 3}" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(folder / f"{number}.png")
    return root


def folders(root: Path, targets: Sequence[str], **options: Any) -> tuple[Tensor, Path]:
    """Pixels of the first source image, and the file that it is kept in."""
    config = DataConfig(dir=root, target_domains=tuple(targets), **{"image_size": SIDE, **options})
    dataset = load_dataset("folders", config)
    assert dataset.decoded is not None
    return dataset.splits["source"].pixels(torch.tensor([0])), dataset.decoded.path


def test_choices_of_target_domains_share_one_file_and_sizes_do_not(tmp_path: Path) -> None:
    one, path = folders(tree(tmp_path), ["domain0"])
    other, its_path = folders(tmp_path, ["domain1"])
    assert not torch.equal(one, other)
    assert path == its_path
    assert path.parent == tmp_path / ".decoded"
    smaller, another_path = folders(tmp_path, ["domain0"], image_size=8)
    assert smaller.shape == (1, 8, 8, 3)
    assert another_path != path


def test_kept_images_are_not_taken_for_a_domain(tmp_path: Path) -> None:
    folders(tree(tmp_path), ["domain0"])
    dataset = load_dataset("folders", DataConfig(dir=tmp_path, target_domains=("domain0",)))
    names = {name for split in dataset.splits.values() for name in split.domain_names.values()}
    assert names == {"domain0", "domain1", "domain2"}


def test_the_configuration_says_where_and_how_much(tmp_path: Path) -> None:
    _, path = folders(tree(tmp_path / "data"), ["domain0"], decoded_dir=tmp_path / "there", decoded_gb=1)
    assert path.parent == tmp_path / "there"
    off = DataConfig(dir=tmp_path / "data", target_domains=("domain0",), decoded_gb=0)
    assert load_dataset("folders", off).decoded is None


def test_what_writes_nothing_keeps_nothing(tmp_path: Path) -> None:
    config = DataConfig(dir=tree(tmp_path), target_domains=("domain0",), image_size=SIDE)
    dataset = load_dataset("folders", config, Opening(writes=False))
    dataset.splits["source"].pixels(torch.arange(3))
    assert not (tmp_path / ".decoded").exists()
