"""Files of a report without torch: text and JSON that somebody else may have made, and pages written whole."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmoe.errors import UserError, printable, shortened
from dmoe.reading import read_text

LARGEST = 1 << 26
"""Bytes of a file that is read."""

LONGEST_NAME = 160
"""Characters of a name that is shown."""


def text_of(path: Path, *, way: str) -> str:
    """The text of a file.

    Args:
        way: what to do where there is none.

    Raises:
        UserError: there is none, or it is no regular file of a sensible size in UTF-8.
    """
    try:
        return read_text(path, at_most=LARGEST)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: {way}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged, not text in UTF-8: bring it back, or delete it to make it again") from None


def objects_in_lines(path: Path, *, way: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The JSON objects of a file, one a line, each with the place to name where something is wrong with it.

    Raises:
        UserError: as :func:`text_of`; or a line is no JSON object.
    """
    for number, line in enumerate(text_of(path, way=way).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def object_in(path: Path, *, way: str) -> Mapping[str, Any]:
    """The JSON object that is a file.

    Raises:
        UserError: as :func:`text_of`; or it is no JSON object.
    """
    return _object(text_of(path, way=way), str(path))


def write_whole(path: Path, text: str) -> None:
    """Write a file that takes its name once it is complete.

    Raises:
        UserError: nothing can be written there; what was there is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}: make room there") from None


def name_of(value: object) -> str:
    """A name from a file as it can be shown: one line, printable, not too long."""
    return shortened(printable(str(value)), LONGEST_NAME)


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged, not JSON ({error}): mend it, or delete it to make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: damaged, not a JSON object: mend it, or delete it to make it again")
    return content
