"""From a picture to the tensor a network takes."""

import math
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
AT_ONCE = 1 << 19
"""Numbers that a CPU standardises at a time."""


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
        return self.finish(torch.from_numpy(self.pixels(picture).copy())[None])[0]

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
        picture = _convertible(picture)
        mode = "L" if channels == 1 else "RGB"
        if picture.mode != mode:
            picture = picture.convert(mode)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.frombuffer(picture.tobytes(), dtype=np.uint8).reshape(height, width, channels)

    def finish(self, pixels: Tensor) -> Tensor:
        """Pictures made by :meth:`pixels`, ``[B, H, W, C]``, as float32 ``[B, C, H, W]``."""
        if self.takes_bands:
            return pixels.permute(0, 3, 1, 2)
        count, height, width, channels = pixels.shape
        on_cpu = pixels.device.type == "cpu"
        if self.per_image:
            images = torch.empty(count, channels, height * width, device=pixels.device)
            at_once = 1 if on_cpu else max(1, count)
            for rows, part in zip(images.split(at_once), pixels.split(at_once), strict=True):
                rows.copy_(part.flatten(1, 2).transpose(1, 2).contiguous()).div_(255)
                rows.sub_(rows.mean(dim=2, keepdim=True))
                # By rows first: one sum over all pixels would lose digits. A true deviation is never as small as the residue.
                norm = torch.linalg.vector_norm(rows.view(-1, channels, height, width), dim=3).norm(dim=2).unsqueeze(2)
                std = norm / math.sqrt(max(1, height * width - 1))
                rows.div_(std.where(std > 1e-6, 1.0))
            return images.view(count, channels, height, width)
        # Rows as vectors of width x channels: a vector of three is slow to work with. Channels stay last in memory.
        images = torch.empty(count * height, width * channels, device=pixels.device)
        white = torch.tensor(255.0, device=pixels.device)
        mean, std = (torch.tensor(values, device=pixels.device).expand(channels).repeat(width) for values in (self.mean, self.std))
        standardises, minus_mean = self.mean != (0.0,) or self.std != (1.0,), -mean
        # A few pictures at a time on a CPU: what is worked on stays in its cache.
        at_once = height * max(1, AT_ONCE // (height * width * channels) if on_cpu else count)
        for rows, part in zip(images.split(at_once), pixels.reshape(images.shape).split(at_once), strict=True):
            rows.copy_(part)
            if standardises:
                torch.addcdiv(minus_mean, rows, white, out=rows).div_(std)  # rows / 255 - mean, in one go
            else:
                rows.div_(white)
        return images.view(count, height, width, channels).permute(0, 3, 1, 2)

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "ImageTransform":
        """What :meth:`to_facts` made, with lists for tuples.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        shape, mean, std, per_image = facts["image_shape"], facts["mean"], facts["std"], facts["per_image"]
        for name, values, kinds in (("image_shape", shape, (int,)), ("mean", mean, (int, float)), ("std", std, (int, float))):
            if not isinstance(values, list | tuple) or not values or not all(type(value) in kinds for value in values):
                raise ValueError(f"{name} {values!r}")
        if len(shape) != 3 or min(shape) < 1 or {len(mean), len(std)} - {1, shape[0]} or type(per_image) is not bool:
            raise ValueError(f"image_shape {shape}, mean {mean}, std {std}, per_image {per_image!r}")
        if not all(abs(value) < 1e30 for value in (*mean, *std)) or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}")
        return cls(tuple(shape), mean=tuple(mean), std=tuple(std), per_image=per_image)


def turn(images: Tensor, view: Tensor) -> None:
    """Turn square images ``[B, H, H, C]``, each into its own one of eight views ``[B]``: 0 is upright, 4 and up are mirrored."""
    for image, number in zip(images, view.tolist(), strict=True):
        if number:
            turned = torch.rot90(image.clone(), number % 4, dims=(0, 1))
            image.copy_(turned.flip(1) if number >= 4 else turned)


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
        cropped: Image.Image = transform(_convertible(picture).convert("RGB"))
    return cropped


def _convertible(picture: Image.Image) -> Image.Image:
    """What Pillow converts to grey or RGB as one expects.

    Of 16 bits a pixel the high byte is taken, where Pillow would clip all but the darkest to white. Palettes of which each colour
    has its own transparency go by way of RGBA, else Pillow warns; the colours are the same.

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
    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        return picture.convert("RGBA")
    if picture.mode == "F":
        raise ValueError("holds floating-point pixels: save it with 8 or 16 bits")
    return picture
