"""Single values from a file that somebody else may have made, checked before they are shown."""

import base64
import binascii
import io
from typing import Any

from dmoe.report.rows import number_of

LARGEST_EDGE = 96
LARGEST_IMAGE = 40_000
"""Characters of an image in base64; 96 x 96 pixels in RGB are about 37,000 where they are noise."""

PNG = b"\x89PNG\r\n\x1a\n"


def sure(value: Any) -> float:
    """A finite number.

    Raises:
        TypeError, ValueError: it is none.
    """
    number = number_of(value)
    if number is None:
        raise TypeError("null is no number")
    return number


def whole(value: Any, *, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``.

    Raises:
        TypeError, ValueError: it is none.
    """
    if type(value) is not int:
        raise TypeError(f"{type(value).__name__} is no whole number")
    if not low <= value <= high:
        raise ValueError(f"a number of {value}, expected {low} to {high}")
    return value


def small_png(text: Any) -> str:
    """The text, where it is a whole PNG of a small size in base64.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(text, str):
        raise TypeError("an image is no text")
    if len(text) > LARGEST_IMAGE:
        raise ValueError(f"an image of {len(text)} characters, expected {LARGEST_IMAGE} at most")
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image is no base64: {error}") from None
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    if not content.startswith(PNG) or content[12:16] != b"IHDR" or not (0 < width <= LARGEST_EDGE and 0 < height <= LARGEST_EDGE):
        raise ValueError(f"an image is no PNG of {LARGEST_EDGE} x {LARGEST_EDGE} pixels at most")
    from PIL import Image

    try:
        Image.open(io.BytesIO(content), formats=("PNG",)).verify()  # sums; loading minds only what it needs
        Image.open(io.BytesIO(content), formats=("PNG",)).load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"an image is damaged: {error}") from None
    return text
