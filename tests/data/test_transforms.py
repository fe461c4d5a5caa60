"""From a picture to a tensor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmoe.data.transforms import TURNS, ImageTransform, random_crop, random_views, turn

RED_AND_BLUE = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))


def test_grey_picture_is_scaled_to_one() -> None:
    picture = Image.fromarray(np.array([[0, 255], [51, 102]], dtype=np.uint8))
    assert torch.allclose(ImageTransform((1, 2, 2))(picture), torch.tensor([[[0.0, 1.0], [0.2, 0.4]]]))


def test_colours_become_channels() -> None:
    image = ImageTransform((3, 1, 2))(RED_AND_BLUE)
    assert torch.equal(image, torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]]))


def test_channels_are_standardised_each_by_its_own_numbers() -> None:
    image = ImageTransform((3, 1, 2), mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))(RED_AND_BLUE)
    assert torch.equal(image, torch.tensor([[[1.0, -1.0]], [[0.0, 0.0]], [[-1.0, 3.0]]]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_picture_becomes_float32_of_the_wanted_shape(mode: str, channels: int) -> None:
    image = ImageTransform((channels, 14, 20))(Image.new(mode, (33, 47)))
    assert (image.dtype, image.shape) == (torch.float32, (channels, 14, 20))


def test_height_comes_before_width() -> None:
    picture = Image.fromarray(np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8))
    assert torch.equal(ImageTransform((1, 2, 3))(picture), torch.tensor([[[0.0] * 3, [1.0] * 3]]))


def test_transform_survives_json() -> None:
    transform = ImageTransform((3, 96, 96), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert ImageTransform.from_facts(json.loads(json.dumps(transform.to_facts()))) == transform


def test_one_picture_is_made_as_a_batch_of_pictures_is() -> None:
    transform = ImageTransform((3, 5, 5), per_image=True)
    pictures = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)) for seed in range(3)]
    pixels = torch.stack([torch.from_numpy(transform.pixels(picture).copy()) for picture in pictures])
    assert torch.equal(transform.finish(pixels), torch.stack([transform(picture) for picture in pictures]))


def test_bands_are_resized_and_not_scaled() -> None:
    bands = np.full((8, 4, 4), 1000.0)
    bands[3] = -7
    image = ImageTransform((8, 6, 6))(bands)
    assert (image.dtype, image.shape) == (torch.float32, (8, 6, 6))
    assert torch.allclose(image[3], torch.full((6, 6), -7.0))
    assert torch.allclose(image[4], torch.full((6, 6), 1000.0))


@pytest.mark.parametrize("bands", [np.zeros((3, 6, 6)), np.zeros((6, 6)), np.zeros((8, 6, 0)), np.full((8, 6, 6), "a")])
def test_bands_of_another_number_or_kind_are_refused(bands: np.ndarray) -> None:
    with pytest.raises(ValueError, match="holds"):
        ImageTransform((8, 6, 6)).pixels(bands)


def test_an_array_is_no_picture() -> None:
    with pytest.raises(ValueError, match="picture was expected"):
        ImageTransform((3, 6, 6)).pixels(np.zeros((6, 6, 3), dtype=np.uint8))


@pytest.mark.parametrize("value", [-1, 70_000])
def test_pixels_of_32_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        ImageTransform((1, 2, 2)).pixels(Image.fromarray(np.full((2, 2), value, dtype=np.int32)))


def test_pixels_of_32_bits_that_hold_16_are_read_as_those() -> None:
    pixels = ImageTransform((1, 2, 2)).pixels(Image.fromarray(np.full((2, 2), 100 * 256, dtype=np.int32)))
    assert (pixels == 100).all()


def turned(images: Tensor, view: Tensor) -> Tensor:
    images = images.clone()
    turn(images, view)
    return images


def test_turning_four_times_by_a_quarter_and_mirroring_twice_brings_back_the_image() -> None:
    images = torch.rand(1, 6, 6, 3)  # [B, H, W, C]
    quarter, mirrored = torch.tensor([1]), torch.tensor([4])
    again = images
    for _ in range(4):
        again = turned(again, quarter)
    assert torch.equal(again, images)
    assert not torch.equal(turned(images, mirrored), images)
    assert torch.equal(turned(turned(images, mirrored), mirrored), images)


def test_random_views_are_uniform_and_a_function_of_their_key() -> None:
    views = random_views(8000, TURNS, "test", 1)
    assert torch.equal(views, random_views(8000, TURNS, "test", 1))
    assert not torch.equal(views, random_views(8000, TURNS, "test", 2))
    assert (torch.bincount(views, minlength=TURNS) - 1000).abs().max() < 150


def test_random_crops_keep_seven_tenths_of_the_picture_or_more() -> None:
    across = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8), (60, 60))
    widths = []
    for draw in range(40):
        seen = np.asarray(random_crop(Image.fromarray(across), (60, 60), "test", draw)).astype(int)
        assert seen.shape == (60, 60, 3)
        left, right = sorted((seen[:, 1].mean(), seen[:, -2].mean()))
        widths.append((right - left) / 232)
    assert min(widths) > 0.35  # 0.72 of the width, at 0.7 of the contrast and 0.7 of the brightness
    assert max(widths) > 0.9


def test_random_crops_are_mirrored_half_of_the_time() -> None:
    across = Image.fromarray(np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8), (60, 60)))
    seen = [np.asarray(random_crop(across, (60, 60), "test", draw)).mean(axis=(0, 2)) for draw in range(60)]
    assert 18 <= sum(columns[0] > columns[-1] for columns in seen) <= 42
