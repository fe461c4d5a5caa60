"""The stock ``wilds`` package, with the three mends that today's other packages ask for.

It was last released in 2021. What its data sets, splits and metrics compute is left as it is.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dmoe.models.torchvision_import import torchvision


def wilds() -> ModuleType:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    # Its version check asks the network from two threads, which hold up the end of every process where there is none.
    sys.modules.setdefault("outdated", None)  # type: ignore[arg-type]
    torchvision()
    if "torch_scatter" not in sys.modules and importlib.util.find_spec("torch_scatter") is None:
        sys.modules["torch_scatter"] = _torch_scatter()
    return importlib.import_module("wilds")


@contextmanager
def fractional_seconds() -> Iterator[None]:
    """Lets fmow read its timestamps, some of which have fractions of a second, by a pandas that wants to be told so."""
    import pandas

    original = pandas.to_datetime

    def to_datetime(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"format": "ISO8601", **kwargs})

    pandas.to_datetime = to_datetime
    try:
        yield
    finally:
        pandas.to_datetime = original


def _torch_scatter() -> ModuleType:
    """The one function of torch-scatter that WILDS' metrics call; the package itself takes minutes to compile."""
    module = ModuleType("torch_scatter")

    def scatter(*, src: Tensor, index: Tensor, dim_size: int, reduce: str) -> Tensor:
        zeros = torch.zeros(dim_size, dtype=src.dtype, device=src.device)
        return zeros.scatter_reduce(0, index, src, reduce, include_self=False)

    module.scatter = scatter  # type: ignore[attr-defined]
    return module
