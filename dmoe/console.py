"""What a run says while it works: a line a stage, a bar where somebody watches, TensorBoard scalars."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self, TypeVar

from tqdm import tqdm

from dmoe.errors import printable

Thing = TypeVar("Thing")


_silent = False


def fall_silent() -> None:
    """From now on this process says nothing and shows no bar: another one speaks for it. Errors are told all the same."""
    global _silent  # noqa: PLW0603
    _silent = True


def say(text: str) -> None:
    """One line for the user, or a few, above any bar. What cannot be printed, in a name from a file, is escaped."""
    if not _silent:
        tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(name: str, *, total: int, start: int = 0, unit: str = "step") -> "tqdm[Never]":
    """A bar with the time left; silent unless a person looks at the terminal."""
    return tqdm(desc=name, total=total, initial=start, unit=unit, disable=_silent or None, leave=False, dynamic_ncols=True)


def progress_over(things: Collection[Thing], *, name: str | None, unit: str) -> Iterator[Thing]:
    """The things, with a bar of that name; without a name, without a bar."""
    hidden = True if _silent or name is None else None
    yield from tqdm(things, desc=name, unit=unit, disable=hidden, leave=False, dynamic_ncols=True)


class Scalars:
    """TensorBoard scalars of one stage. Steps from ``start`` on replace those that a cut-off visit wrote."""

    def __init__(self, folder: Path | None, *, start: int = 0) -> None:
        """
        Args:
            folder: None: they are not written.
        """
        self._writer: Any = None
        if folder is None:
            return
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
