"""From a picture to the tensor a network takes."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ImageTransform:
    """Resize, scale to [0, 1], standardise by channel.

    Attributes:
        image_shape: ``(C, H, W)`` of the result; one channel is grey, three are RGB.
        mean: subtracted from each channel, after scaling.
        std: divided by.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, image: Image.Image) -> Tensor:
        """One picture as float32 ``[C, H, W]``."""
        channels, height, width = self.image_shape
        picture = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).view(height, width, channels).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "ImageTransform":
        return cls(**{key: tuple(value) for key, value in facts.items()})
