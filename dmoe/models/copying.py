"""Copies of a module that share its tensors, so that nothing done to a copy shows in the original."""

import copy
from collections.abc import Mapping
from itertools import chain

from torch import Tensor, nn


def private_copy(module: nn.Module) -> nn.Module:
    """The module's structure anew, in eval mode, around the same tensors.

    Costs no memory for weights. Later in-place changes of the original's tensors show in the copy.
    """
    memo: dict[int, Tensor] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, memo).eval()


def set_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Put frozen parameters in the place of those of these names; tied ones are replaced together."""
    fresh = {id(module.get_parameter(name)): nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in fresh:
                part.register_parameter(name, fresh[id(parameter)])
