"""Batch-norm that goes by its running statistics is an affine map: behind a convolution, it can be part of that convolution.

The folded network says the same to rounding, and what its gradients need to remember of every image is about half as much. The
fold is a smooth map of parameters, made anew from those of the moment, so gradients of any order reach the original ones.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from dmoe.models.copying import private_copy

Params = Mapping[str, Tensor]


class _Pair(NamedTuple):
    convolution: str
    norm: str
    mean: Tensor
    variance: Tensor
    epsilon: float


class Folding:
    """A feature extractor in eval mode, in two steps: what depends on its parameters alone, then what depends on images.

    Attributes:
        pairs: how many norms are folded; 0 where none follows a convolution, or the forward pass cannot be traced. Everything
            then works too, and saves nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        """The module is left as it is; later in-place changes of its buffers show here."""
        self._folded = private_copy(module)
        found = [_pair(module, *names) for names in _names_of_pairs(module)]
        for pair in found:
            convolution = self._folded.get_submodule(pair.convolution)
            convolution.register_parameter("bias", nn.Parameter(torch.zeros_like(pair.mean), requires_grad=False))
            self._folded.set_submodule(pair.norm, nn.Identity())
        self._found = found
        self._buffers = dict(self._folded.named_buffers())

    @property
    def pairs(self) -> int:
        return len(self._found)

    def prepare(self, theta: Params) -> dict[str, Tensor]:
        """Parameters of the module, by name, to those of the folded one."""
        psi = dict(theta)
        for pair in self._found:
            weight, bias = f"{pair.convolution}.weight", f"{pair.convolution}.bias"
            scale = psi.pop(f"{pair.norm}.weight") * (pair.variance + pair.epsilon).rsqrt()
            shift = psi.pop(f"{pair.norm}.bias") - pair.mean * scale
            psi[weight] = psi[weight] * scale.view(-1, 1, 1, 1)
            psi[bias] = psi[bias] * scale + shift if bias in psi else shift
        return psi

    def features(self, psi: Params, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of images ``[B, C, H, W]``, by what :meth:`prepare` gave."""
        features: Tensor = functional_call(self._folded, (dict(psi), self._buffers), (images,))
        return features


def _names_of_pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Convolutions whose output goes into a batch-norm and nowhere else, with that norm; each is called once, and has no hooks."""
    try:
        graph = fx.symbolic_trace(module).graph
    except Exception:  # whatever a forward pass does when it is given a stand-in for an image
        return
    parts = dict(module.named_modules())
    calls = Counter(id(parts[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        convolution, norm = parts[str(before.target)], parts[str(node.target)]
        plain = type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.affine and norm.running_mean is not None
        own = all(uses[id(parameter)] == 1 for part in (convolution, norm) for parameter in part.parameters())
        once = calls[id(convolution)] == calls[id(norm)] == 1
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (convolution, norm))
        if plain and own and once and not hooked:
            yield str(before.target), str(node.target)


def _pair(module: nn.Module, convolution: str, norm: str) -> _Pair:
    part = module.get_submodule(norm)
    assert isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None
    return _Pair(convolution, norm, part.running_mean, part.running_var, part.eps)
