"""What tests of files and messages share."""

from pathlib import Path

import pytest

from dmoe.errors import UserError


def names(folder: Path) -> list[str]:
    """Of all there is in a folder."""
    return [path.name for path in folder.iterdir()]


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    """What the user is told, which has to be one line."""
    message = str(caught.value)
    assert "\n" not in message
    return message
