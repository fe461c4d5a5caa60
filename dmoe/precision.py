"""The precision that networks compute in; their weights, gradients and moments stay float32."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16"]


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What runs inside, runs in that precision: for ``bfloat16`` by autocast, which leaves sums and norms in float32."""
    # Without a cache: it would keep weights across derivatives of different orders.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def not_coarse(values: Tensor) -> Tensor:
    """The values, in float32 where they are in bfloat16: losses and what is stored are not left in that."""
    return values.float() if values.dtype == torch.bfloat16 else values
