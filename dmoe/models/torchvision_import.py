"""torchvision, also beside a CPU build of torch.

torchvision's wheels on PyPI carry operators compiled for CUDA's torch. Beside a CPU torch they cannot be loaded, and the import
stops at two operators that only detection models use. Declaring those two is enough for models, transforms and data
sets; ``torchvision.io`` and ``torchvision.ops`` stay unusable there.
"""

import importlib
import sys
from types import ModuleType

import torch

_libraries: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """The package, imported once."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # the declarations last as long as this object
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")
