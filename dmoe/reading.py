"""Reading files that somebody else may have made: whole, regular, and no larger than makes sense."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular(path: Path | bytes, *, at_most: int) -> FileIO:
    """A file to read from, unbuffered.

    Raises:
        OSError: as :func:`open`; or it is no regular file (a pipe that would be waited for, a device without an end), or larger
            than ``at_most`` bytes.
    """
    file = open(path, "rb", buffering=0, opener=_without_waiting)
    state = os.fstat(file.fileno())
    fault = (errno.EINVAL, "not a regular file") if not stat.S_ISREG(state.st_mode) else None
    if fault is None and state.st_size > at_most:
        fault = (errno.EFBIG, f"larger than {at_most:,} bytes")
    if fault is not None:
        file.close()
        raise OSError(*fault, os.fsdecode(path))
    return file


def read_text(path: Path, *, at_most: int) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: as :func:`open_regular`.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_regular(path, at_most=at_most) as file:
        return str(file.read(), encoding="utf-8")


def _without_waiting(path: str | bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
