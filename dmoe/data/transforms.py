"""From a picture to the tensor a network takes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmoe.randomness import Key, generator, seed_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Augmentation = Literal["none", "turns", "crops"]
"""none. turns: the eight rotations by 90 degrees and mirrorings. crops: random crop, mirroring, colours and grey, as DomainBed."""

TURNS = 8


@dataclass(frozen=True)
class ImageTransform:
    """Resize, scale to [0, 1], standardise.

    Attributes:
        image_shape: ``(C, H, W)`` of the result; one channel is grey, three are RGB, other numbers are bands that come as arrays.
        mean: subtracted from each channel, after scaling.
        std: divided by.
        per_image: instead, every channel of every picture gets mean 0 and standard deviation 1.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    per_image: bool = False

    def __call__(self, picture: Image.Image | np.ndarray) -> Tensor:
        """One picture, or bands ``[C, H, W]``, as float32 ``[C, H, W]``."""
        return self.batch([self.pixels(picture)])[0]

    @property
    def takes_bands(self) -> bool:
        """Whether pictures are arrays of any values; no scaling is then done to them."""
        return self.image_shape[0] not in (1, 3)

    def pixels(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """The picture at its size, uint8 ``[H, W, C]``; bands: float32 ``[H, W, C]``.

        Raises:
            ValueError: the picture has a kind of pixels, or bands a shape, that this transform cannot take.
        """
        channels, height, width = self.image_shape
        if self.takes_bands:
            bands = np.asarray(picture)
            if bands.dtype.kind not in "biuf":
                raise ValueError(f"holds {bands.dtype}, expected numbers")
            bands = bands.astype(np.float32, copy=False)
            if bands.ndim != 3 or len(bands) != channels or bands.size == 0:
                raise ValueError(f"holds an array {list(bands.shape)}, expected {channels} bands [C, H, W]")
            if bands.shape[1:] != (height, width):
                resized = F.interpolate(torch.from_numpy(bands)[None], (height, width), mode="bilinear", antialias=True)
                bands = resized[0].numpy()
            return bands.transpose(1, 2, 0)
        if isinstance(picture, np.ndarray):
            raise ValueError("is an array; a picture was expected")
        picture = _eight_bits(picture).convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture).reshape(height, width, channels)

    def batch(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """Pictures made by :meth:`pixels` as a batch, float32 ``[B, C, H, W]``, channels last in memory."""
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        if self.takes_bands:
            return images
        images /= 255
        if self.per_image:
            std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
            std[std == 0] = 1
            return (images - mean) / std
        if self.mean != (0.0,) or self.std != (1.0,):
            images -= torch.tensor(self.mean).view(-1, 1, 1)
            images /= torch.tensor(self.std).view(-1, 1, 1)
        return images

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "ImageTransform":
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
        return cls(**plain)


def turned(images: Tensor, view: Tensor) -> Tensor:
    """Square images ``[B, C, H, H]``, each turned into its own one of eight views ``[B]``: 0 is upright, 4 and up are mirrored."""
    if not bool(view.any()):
        return images
    out = images.clone()
    for number in view.unique().tolist():
        chosen = view == number
        turned_images = torch.rot90(images[chosen], number % 4, dims=(2, 3))
        out[chosen] = turned_images.flip(3) if number >= 4 else turned_images
    return out


def random_views(count: int, views: int, *key: Key) -> Tensor:
    """A stored view for each of ``count`` images, ``[count]``, uniformly and independently."""
    return torch.randint(views, (count,), generator=generator(*key))


def random_crop(picture: Image.Image, size: tuple[int, int], *key: Key) -> Image.Image:
    """DomainBed's augmentation: a random crop of 70% or more, mirroring, colours, grey now and then.

    Source: Gulrajani & Lopez-Paz, *In search of lost domain generalization*, ICLR 2021, appendix D.
    """
    from dmoe.models.torchvision_import import torchvision

    kinds = torchvision().transforms
    transform = kinds.Compose(
        [
            kinds.RandomResizedCrop(size, scale=(0.7, 1.0)),
            kinds.RandomHorizontalFlip(),
            kinds.ColorJitter(0.3, 0.3, 0.3, 0.3),
            kinds.RandomGrayscale(),
        ]
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seed_of(*key))
        cropped: Image.Image = transform(_eight_bits(picture).convert("RGB"))
    return cropped


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits a pixel as 8, by its high byte; Pillow itself would clip it to white.

    Raises:
        ValueError: pixels are of 32 bits or floating.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "I":
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("holds pixels of 32 bits: save it with 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("holds floating-point pixels: save it with 8 or 16 bits")
    return picture
