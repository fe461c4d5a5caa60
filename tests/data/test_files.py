"""Images in files: what is read, what is refused, stored views and fresh draws."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmoe.data.files import ImageFiles, kept, missing, read_pixels, unreadable
from dmoe.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation, ImageTransform
from dmoe.errors import UserError
from dmoe.models.torchvision_import import torchvision
from tests.told import one_line

RGB, GREY, BANDS = ImageTransform((3, 8, 8)), ImageTransform((1, 8, 8)), ImageTransform((4, 8, 8))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def colours(side: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(side, side, 3, seed=seed))


def save(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def split_of(
    root: Path, *pictures: Image.Image, transform: ImageTransform = RGB, augmentation: Augmentation = "none"
) -> ImageFiles:
    """A split of pictures, each in a file of its own."""
    paths = [f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(root / path)
    zeros = torch.zeros(len(paths), dtype=torch.int64)
    return ImageFiles(
        root=root,
        paths=paths,
        labels=zeros,
        domains=zeros,
        domain_names={0: "a"},
        transform=transform,
        augmentation=augmentation,
    )


def refused(path: Path, transform: ImageTransform = RGB) -> str:
    with pytest.raises(UserError) as caught:
        read_pixels(path, transform)
    assert str(path) in one_line(caught)
    return one_line(caught)


@pytest.mark.parametrize(("channels", "transform"), [(1, GREY), (3, RGB)])
def test_sixteen_bit_grey_is_read_by_its_high_byte(tmp_path: Path, channels: int, transform: ImageTransform) -> None:
    high = noise(8, 8)
    path = save(Image.fromarray(high.astype(np.uint16) * 256 + 77), tmp_path / "deep.png")
    assert np.array_equal(read_pixels(path, transform), np.repeat(high[..., None], channels, axis=2))


def test_sixteen_bit_grey_is_read_by_its_high_byte_for_crops_too(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.full((20, 20), 100 * 256, dtype=np.uint16)), tmp_path / "deep.png")
    seen = [int(read_pixels(path, GREY, draw=draw).max()) for draw in range(8)]
    assert all(60 <= brightest <= 140 for brightest in seen)  # colours vary by 0.3; clipped to white it would be 170 and up


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    bits = noise(8, 8) > 127
    path = save(Image.fromarray(bits), tmp_path / "bits.png")
    assert Image.open(path).mode == "1"
    assert np.array_equal(read_pixels(path, GREY)[..., 0], np.where(bits, 255, 0))


def test_palette_with_transparency_has_the_colours_of_its_palette_and_no_warning(tmp_path: Path) -> None:
    picture = colours().quantize(16)
    path = save(picture, tmp_path / "palette.png", transparency=bytes(range(16)))
    assert isinstance(Image.open(path).info["transparency"], bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_pixels(path, RGB)
    assert np.array_equal(pixels, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    picture = colours().convert(mode)
    picture.putalpha(Image.fromarray(noise(8, 8, seed=1)))
    path = save(picture, tmp_path / "alpha.png")
    below = np.asarray(picture)[..., :-1]
    assert np.array_equal(read_pixels(path, RGB), np.broadcast_to(below, (8, 8, 3)))


def test_cmyk_jpeg_has_its_colours(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (8, 8), (200, 40, 90)).convert("CMYK"), tmp_path / "print.jpg", quality=100)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(read_pixels(path, RGB).astype(int) - (200, 40, 90)).max() <= 3


def test_grey_picture_becomes_three_equal_channels_where_colours_are_expected(tmp_path: Path) -> None:
    grey = noise(8, 8)
    path = save(Image.fromarray(grey), tmp_path / "grey.png")
    assert np.array_equal(read_pixels(path, RGB), np.stack([grey] * 3, axis=2))


def test_floating_pixels_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.ones((8, 8), dtype=np.float32)), tmp_path / "float.tif")
    assert "floating-point" in refused(path)


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_a_truncated_picture_is_refused(tmp_path: Path, name: str) -> None:
    path = save(colours(64), tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "data.skip_unreadable=true" in refused(path)


@pytest.mark.parametrize("content", [b"", b"these are words\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_file_that_only_its_name_calls_a_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert "cannot be read as an image" in refused(path)


def test_a_missing_picture_is_told_as_missing(tmp_path: Path) -> None:
    assert "no such image" in refused(tmp_path / "gone.png")
    assert "no such image" in refused(tmp_path / "gone.npz", BANDS)


def test_a_picture_of_far_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(colours(64), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "cannot be read" in refused(path)


def test_bands_come_from_x_of_an_archive_as_they_are(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).normal(size=(4, 8, 8))
    np.savez(tmp_path / "bands.npz", x=bands, y=np.zeros(3))
    pixels = read_pixels(tmp_path / "bands.npz", BANDS)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, bands.astype(np.float32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"bands": np.zeros((4, 8, 8))}, "x"),
        ({"x": np.zeros((3, 8, 8))}, "expected 4 bands"),
        ({"x": np.zeros((4, 0, 8))}, "expected 4 bands"),
        ({"x": np.zeros((8, 8))}, "expected 4 bands"),
        ({"x": np.full((4, 8, 8), "a")}, "expected numbers"),
        ({"x": np.zeros((4, 8, 8), dtype=[("a", "f4"), ("b", "f4")])}, "expected numbers"),
        ({"x": np.zeros((4, 8, 8), dtype=complex)}, "expected numbers"),
    ],
)
def test_an_archive_without_bands_of_the_right_kind_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], why: str) -> None:
    np.savez(tmp_path / "bands.npz", **arrays)  # type: ignore[arg-type]
    assert why in refused(tmp_path / "bands.npz", BANDS)


def test_a_single_array_under_the_name_of_an_archive_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "bands.npz", "wb") as file:
        np.save(file, np.zeros((4, 8, 8)))
    assert "not an archive" in refused(tmp_path / "bands.npz", BANDS)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bands.npz"
    np.savez(path, x=np.zeros((4, 8, 8)))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refused(path, BANDS)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def test_code_in_an_archive_of_objects_does_not_run(tmp_path: Path) -> None:
    sign, path = tmp_path / "it ran", tmp_path / "bands.npz"
    np.savez(path, x=np.array([Code(sign)], dtype=object), allow_pickle=True)
    assert "cannot be read" in refused(path, BANDS)
    path.write_bytes(pickle.dumps(Code(sign)))
    assert "cannot be read" in refused(path, BANDS)
    assert not sign.exists()
    pickle.loads(path.read_bytes())  # this is what it would have done
    assert sign.exists()


def test_missing_names_paths_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("top.png", "a/one.png", "a/two.png"):
        (tmp_path / name).touch()
    paths = ["a/one.png", "a/three.png", "top.png", "b/one.png", str(tmp_path / "a" / "two.png"), "a/one.PNG", "c\0/d.png"]
    assert missing(tmp_path, paths) == [1, 3, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_finds_every_path_that_cannot_be_read(tmp_path: Path, workers: int) -> None:
    for number in range(150):
        save(colours(), tmp_path / f"{number}.bmp")
    for number in (3, 70, 149):
        (tmp_path / f"{number}.bmp").write_bytes(b"BM")
    paths = [f"{number}.bmp" for number in range(151)]
    assert unreadable(tmp_path, paths, RGB, workers=workers) == ["3.bmp", "70.bmp", "149.bmp", "150.bmp"]


def test_nothing_is_unreadable_where_there_is_nothing(tmp_path: Path) -> None:
    assert unreadable(tmp_path, [], RGB, workers=2) == []


def test_kept_are_the_numbers_that_are_not_left_out() -> None:
    assert kept(5, [3, 0]).tolist() == [1, 2, 4]
    assert kept(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [8, 5, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_of_torchvision(tmp_path: Path, size: int, channels: int) -> None:
    kinds = torchvision().transforms
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,), (1.0,))
    pictures = [colours(8, seed=seed) for seed in range(3)]
    straight = kinds.Compose([kinds.Resize((size, size)), kinds.ToTensor(), kinds.Normalize(mean, std)])
    expected = torch.stack([straight(p.convert("L" if channels == 1 else "RGB")) for p in pictures])
    split = split_of(tmp_path, *pictures, transform=ImageTransform((channels, size, size), mean=mean, std=std))
    assert torch.equal(split.images(torch.tensor([2, 0, 1])), expected[[2, 0, 1]])


def test_pixels_travel_as_bytes_and_are_finished_into_the_same_images(tmp_path: Path) -> None:
    split = split_of(tmp_path, colours(seed=0), colours(seed=1), augmentation="turns")
    index, view = torch.tensor([1, 0]), torch.tensor([3, 6])
    pixels = split.pixels(index, view=view)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 8, 8, 3))
    assert torch.equal(split.finish(pixels), split.images(index, view=view))


def test_bands_become_images_unscaled(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", x=bands[number])
    zeros = torch.zeros(2, dtype=torch.int64)
    paths = ["0.npz", "1.npz"]
    split = ImageFiles(root=tmp_path, paths=paths, labels=zeros, domains=zeros, domain_names={0: "a"}, transform=BANDS)
    assert torch.equal(split.images(torch.tensor([1, 0])), torch.from_numpy(bands[[1, 0]]))


def test_per_image_standardisation_is_that_of_the_wilds_benchmark(tmp_path: Path) -> None:
    pictures = [colours(seed=0), Image.new("RGB", (8, 8), (10, 20, 30))]
    images = split_of(tmp_path, *pictures, transform=ImageTransform((3, 8, 8), per_image=True)).images(torch.arange(2))
    plain = torchvision().transforms.functional.to_tensor(pictures[0])
    mean, std = plain.mean(dim=(1, 2), keepdim=True), plain.std(dim=(1, 2), keepdim=True)
    assert torch.allclose(images[0], (plain - mean) / std, atol=1e-5)
    assert torch.allclose(images[1], torch.zeros(3, 8, 8), atol=1e-5)  # an even picture has no deviation to divide by


def turned_picture(picture: Image.Image, view: int) -> Image.Image:
    functional = torchvision().transforms.functional
    turned = functional.rotate(picture, 90 * (view % 4))
    return functional.hflip(turned) if view >= 4 else turned  # type: ignore[no-any-return]


def all_views(split: ImageFiles) -> Tensor:
    """The eight views of image 0."""
    return split.images(torch.zeros(8, dtype=torch.int64), view=torch.arange(8))


def test_the_eight_views_are_rotations_and_mirrorings_of_the_picture(tmp_path: Path) -> None:
    picture = colours()
    views = all_views(split_of(tmp_path, picture, augmentation="turns"))
    expected = torch.stack([torchvision().transforms.functional.to_tensor(turned_picture(picture, view)) for view in range(8)])
    assert torch.equal(views, expected)


def test_the_eight_views_of_standardised_pictures_are_those_of_the_turned_pictures(tmp_path: Path) -> None:
    picture, transform = colours(), ImageTransform((3, 8, 8), per_image=True)
    views = all_views(split_of(tmp_path, picture, transform=transform, augmentation="turns"))
    assert torch.allclose(views, torch.stack([transform(turned_picture(picture, view)) for view in range(8)]), atol=1e-5)


def test_the_eight_views_are_distinct_and_the_first_is_upright(tmp_path: Path) -> None:
    split = split_of(tmp_path, colours(), augmentation="turns")
    views = all_views(split)
    assert split.views == 8
    assert len(torch.unique(views.flatten(1), dim=0)) == 8
    assert torch.equal(views[0], split.images(torch.tensor([0]))[0])


def test_each_image_is_seen_in_its_own_view(tmp_path: Path) -> None:
    split = split_of(tmp_path, *(colours(seed=seed) for seed in range(4)), augmentation="turns")
    index, view = torch.tensor([3, 1, 3, 0]), torch.tensor([5, 0, 2, 7])
    one_by_one = torch.cat([split.images(index[i : i + 1], view=view[i : i + 1]) for i in range(4)])
    assert torch.equal(split.images(index, view=view), one_by_one)


def test_draws_of_turns_are_pure_functions_of_the_number_and_use_all_views(tmp_path: Path) -> None:
    split = split_of(tmp_path, colours(), augmentation="turns")
    index, views = torch.zeros(400, dtype=torch.int64), all_views(split).flatten(1)
    drawn = split.images(index, draw=5)
    torch.manual_seed(99)
    assert torch.equal(split.images(index, draw=5), drawn)
    assert not torch.equal(split.images(index, draw=6), drawn)
    counts = (drawn.flatten(1)[:, None] == views[None]).all(dim=2).sum(dim=0)
    assert counts.sum() == 400
    assert counts.min() > 25


def test_without_augmentation_a_draw_and_a_view_change_nothing(tmp_path: Path) -> None:
    split = split_of(tmp_path, colours())
    plain = split.images(torch.tensor([0]))
    assert split.views == 1
    assert torch.equal(split.images(torch.tensor([0]), draw=3), plain)
    assert torch.equal(split.images(torch.tensor([0]), view=torch.tensor([0])), plain)


def test_crops_are_pure_functions_of_draw_and_image(tmp_path: Path) -> None:
    split = split_of(tmp_path, *(colours(32, seed=seed) for seed in range(3)), augmentation="crops")
    index = torch.tensor([0, 1, 2])
    drawn = split.images(index, draw=5)
    torch.manual_seed(99)
    assert torch.equal(split.images(index, draw=5), drawn)
    assert torch.equal(split.images(torch.tensor([2, 0]), draw=5), drawn[[2, 0]])  # whatever else is in the batch
    assert not torch.equal(split.images(index, draw=6), drawn)


def test_two_images_are_cropped_differently(tmp_path: Path) -> None:
    split = split_of(tmp_path, colours(32), colours(32), augmentation="crops")
    drawn = split.images(torch.tensor([0, 1]), draw=5)
    assert not torch.equal(drawn[0], drawn[1])


def test_crops_leave_stored_views_and_the_global_random_state_alone(tmp_path: Path) -> None:
    picture = colours()
    split = split_of(tmp_path, picture, augmentation="crops")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    split.images(torch.tensor([0]), draw=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert split.views == 1
    assert torch.equal(split.images(torch.tensor([0]))[0], torchvision().transforms.functional.to_tensor(picture))


def test_names_of_any_bytes_are_found_again(tmp_path: Path) -> None:
    names = ["Zürich.png", "写真.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        save(colours(), tmp_path / name)
    zeros = torch.zeros(3, dtype=torch.int64)
    split = ImageFiles(root=tmp_path, paths=names, labels=zeros, domains=zeros, domain_names={0: "a"}, transform=RGB)
    assert [split.path(number).name for number in range(3)] == names
    assert split.images(torch.arange(3)).shape == (3, 3, 8, 8)
