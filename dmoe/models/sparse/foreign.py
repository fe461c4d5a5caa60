"""Names that others give to the tensors of vision transformers, dense and sparse.

Tutel's layer, which the public code of GMoE is built on, keeps W1 as ``[E, h, d]`` and W2 as ``[E, h, d]``.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from dmoe.errors import UserError

_KNOWN = "pos_embed"
"""Every such network has one; what stands before its name, stands before all names."""
_TUTEL = {
    "experts.batched_fc1_w": "w1",
    "experts.batched_fc1_bias": "b1",
    "experts.batched_fc2_w": "w2",
    "experts.batched_fc2_bias": "b2",
    "gates.0.wg.weight": "router.weight",
    "gates.0.cosine_projector.weight": "router.projection.weight",
    "gates.0.cosine_projector.bias": "router.projection.bias",
    "gates.0.sim_matrix": "router.codes",
    "gates.0.temperature": "router.log_scale",
}
_LAYER = re.compile(r"(?P<place>.*\.mlp)\.(?:\w*moe\w*\.)?(?P<name>experts\..*|gates\..*|_num_global_experts)")


def as_features(tensors: Mapping[str, Tensor], *, own: Collection[str], where: str) -> dict[str, Tensor]:
    """Tensors of a vision transformer under the names of ours: without a prefix, a classifier, and Tutel's names.

    Args:
        own: names of ours; only what is none of them is taken for a classifier.

    Raises:
        UserError: a tensor of Tutel's layer has a name or a shape that is not known.
    """
    known = [name for name in tensors if name == _KNOWN or name.endswith(f".{_KNOWN}")]
    prefix = known[0].removesuffix(_KNOWN) if len(known) == 1 else ""
    found = {}
    for full, tensor in tensors.items():
        if not full.startswith(prefix):
            continue
        name = full.removeprefix(prefix)
        if name.startswith(("head.", "head_dist.")) and name not in own:
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            found[name] = tensor
        elif layer["name"] != "_num_global_experts":
            found[f"{layer['place']}.{_ours(layer['name'], full, where)}"] = _laid_out(layer["name"], tensor, full, where)
    return found


def holds_sparse(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors under our names are those of a network with sparse layers."""
    return any(name.endswith(".mlp.w1") for name in tensors)


def _ours(name: str, full: str, where: str) -> str:
    if name not in _TUTEL:
        raise UserError(f"{where}: {full} is no tensor of a sparse layer that is known: bring a file of GMoE's public code")
    return _TUTEL[name]


def _laid_out(name: str, tensor: Tensor, full: str, where: str) -> Tensor:
    if name.startswith("experts.") and tensor.ndim != (3 if name.endswith("_w") else 2):
        raise UserError(f"{where}: {full} is {list(tensor.shape)}: bring a file of GMoE's public code")
    return tensor.mT.contiguous() if name == "experts.batched_fc1_w" else tensor
