"""Copies of a module that share its tensors, so that nothing done to a copy shows in the original."""

import copy
from collections.abc import Mapping
from itertools import chain

from torch import Tensor, nn


def private_copy(module: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The module's structure anew, in eval mode, around the same tensors; ``parameters`` replace those of these names.

    Costs no memory for weights. Later in-place changes of the original's tensors show in the copy.
    """
    memo: dict[int, Tensor] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    for name, value in (parameters or {}).items():
        memo[id(module.get_parameter(name))] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(module, memo).eval()
