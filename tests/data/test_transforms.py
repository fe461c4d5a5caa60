"""From a picture to a tensor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe.data.transforms import ImageTransform

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
