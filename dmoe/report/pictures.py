"""Which things are shown where there are too many, and images as small PNGs."""

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dmoe.data.transforms import ImageTransform
from dmoe.report.checked import LARGEST_EDGE


def spread_out(things: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly from the first to the last."""
    if len(things) <= count:
        return list(things)
    return [things[round(place * (len(things) - 1) / (count - 1))] for place in range(count)]


def png_of(image: Tensor, transform: ImageTransform) -> str:
    """A standardised image ``[C, H, W]`` as a small PNG in base64: standardising undone, or where it was by image or of bands,
    from its darkest to its brightest value; of more than three bands the first.
    """
    pixels = image.detach().cpu().float()
    if transform.takes_bands:
        pixels = pixels[:1]
    if transform.takes_bands or transform.per_image:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    else:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (transform.mean, transform.std))
        pixels = pixels * std + mean
    grid = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid)
    if max(picture.size) > LARGEST_EDGE:
        picture.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
