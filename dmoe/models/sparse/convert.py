"""Transformers of timm and torch with sparse layers in the place of some of their feed-forward parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmoe.errors import UserError
from dmoe.models.sparse.ffn import SplitFFN, blocks_of, clustered_units, consecutive_units, copies
from dmoe.models.sparse.layer import SparseFFN, sparse_layers
from dmoe.models.sparse.routing import CosineRouter, LinearRouter
from dmoe.models.torchvision_import import torchvision

Kind = Literal["gmoe", "emoe"]
Router = Literal["cosine", "linear", "average"]


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """What the sparse layers of a network are.

    Attributes:
        kind: gmoe: experts are copies of the dense part; emoe: they share out its hidden units.
        experts: E.
        top_k: experts for a token.
        router: cosine or linear, learned; average, of emoe: no more than the experts' own weights.
        capacity_factor: what experts take over an equal share of the tokens; None: all.
        blocks: which, see :func:`~dmoe.models.sparse.ffn.blocks_of`.
        gate_noise, balance_weight: in training.
        dropout: of hidden units, in training.
        drop_path: of the last block, rising linearly from 0 in the first, in training.
    """

    kind: Kind
    experts: int
    top_k: int
    router: Router
    capacity_factor: float | None
    blocks: str | Sequence[int]
    gate_noise: float
    balance_weight: float
    dropout: float
    drop_path: float


@dataclass(frozen=True)
class _Dense:
    """A feed-forward part of a block, and how to put another in its place."""

    first: nn.Linear
    second: nn.Linear
    act: Callable[[Tensor], Tensor]
    replace: Callable[[SparseFFN], None]


def make_sparse(network: nn.Module, settings: SparseSettings, *, clustered: bool = True) -> nn.Module:
    """The network itself, sparse in the blocks that are asked for.

    Args:
        network: a vision transformer of timm, or a ``torch.nn.TransformerEncoder``.
        clustered: emoe: whether hidden units that are alike go together; where weights are loaded later, they need not.

    Raises:
        UserError: the network has no such blocks, or the experts do not fit.
    """
    blocks = _blocks(network)
    try:
        numbers = blocks_of(settings.blocks, len(blocks))
    except ValueError as error:
        raise UserError(f"backbone.sparse.blocks: {error}: choose others") from None
    if not numbers:
        raise UserError(f"backbone.sparse.blocks: there are none among {len(blocks)} blocks: choose others")
    if settings.top_k > settings.experts:
        raise UserError(f"backbone.sparse.top_k: must be <= sparse.experts, {settings.experts}, got {settings.top_k}")
    for number in numbers:
        dense = _dense(blocks[number])
        dense.replace(_sparse(dense, settings, clustered=clustered))
    set_drop_path(blocks, settings.drop_path)
    if isinstance(network, nn.TransformerEncoder):
        network.use_nested_tensor = False  # as in its layers
    return network


def make_dense(network: nn.Module) -> nn.Module:
    """The network itself, each of its split layers put together again: what :func:`make_sparse` made of an ``emoe``, undone.

    Raises:
        UserError: its experts are no parts of a dense layer.
    """
    for name, layer in sparse_layers(network).items():
        if not isinstance(layer, SplitFFN):
            raise UserError(f"{name}: its experts are not parts of one dense layer: only emoe can be made dense")
        block: Any = network.get_submodule(name.rpartition(".")[0])
        first, second = layer.dense()
        if isinstance(block, nn.TransformerEncoderLayer):
            block.linear1, block.linear2, block.dropout = first, second, nn.Dropout(layer.dropout)
            del block.activation  # a function does not take the place of a module
            block.activation = layer.act
        else:
            part = _perceptron()(first.in_features, first.out_features)
            part.fc1, part.fc2, part.act = first, second, layer.act
            block.mlp = part.train(layer.training)
    return network


class DropPath(nn.Module):
    """Leaves out what a block adds to an image, at that rate, in training; otherwise adds more by as much.

    Source: Huang et al., *Deep networks with stochastic depth*, ECCV 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]``."""
        if not (self.training and self.rate):
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


def _perceptron() -> Any:
    """timm's two linear layers."""
    torchvision()  # timm imports it
    from timm.layers import Mlp

    return Mlp


def set_drop_path(blocks: Sequence[nn.Module], last: float) -> None:
    """Give blocks of timm drop paths whose rates rise linearly from 0 to ``last``; 0 leaves them alone."""
    for number, block in enumerate(blocks):
        if last and hasattr(block, "drop_path1"):
            rate = last * number / max(1, len(blocks) - 1)
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def _sparse(dense: _Dense, settings: SparseSettings, *, clustered: bool) -> SparseFFN:
    hidden, width = dense.first.weight.shape
    experts = settings.experts
    routers = {"cosine": CosineRouter, "linear": LinearRouter}
    router = None if settings.router == "average" else routers[settings.router](width=width, experts=experts)
    where = dense.first.weight
    if settings.kind == "gmoe":
        made = SparseFFN(
            copies(dense.first, dense.second, experts),
            act=dense.act,
            router=router,
            top_k=settings.top_k,
            weighting="probability",
            capacity_factor=settings.capacity_factor,
            gate_noise=settings.gate_noise,
            balance_weight=settings.balance_weight,
            dropout=settings.dropout,
        )
    else:
        if hidden % experts:
            raise UserError(f"backbone.sparse.experts: {experts} experts do not divide the hidden width {hidden}: choose others")
        made = SplitFFN(
            first=dense.first,
            second=dense.second,
            units=clustered_units(dense.first, experts) if clustered else consecutive_units(hidden, experts),
            act=dense.act,
            router=router,
            top_k=settings.top_k,
            weighting="one" if router is None else "mean_one",
            capacity_factor=settings.capacity_factor,
            gate_noise=settings.gate_noise,
            balance_weight=settings.balance_weight,
            dropout=settings.dropout,
        )
    return made.to(device=where.device, dtype=where.dtype)


def _blocks(network: nn.Module) -> Sequence[nn.Module]:
    blocks = network.layers if isinstance(network, nn.TransformerEncoder) else getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise UserError(f"backbone.sparse: {type(network).__name__} has no transformer blocks: choose a vision transformer")
    return list(blocks)


def _dense(block: nn.Module) -> _Dense:
    """The feed-forward part of a block.

    Raises:
        UserError: it has none of the two kinds that are known.
    """
    if isinstance(block, nn.TransformerEncoderLayer):
        layer = block

        def replace_layers(made: SparseFFN) -> None:
            layer.linear1, layer.linear2, layer.dropout = made, nn.Identity(), nn.Identity()  # type: ignore[assignment]
            layer.activation = nn.Identity()
            layer.activation_relu_or_gelu = 0  # torch's fused way knows dense layers only

        if not isinstance(layer.linear1, nn.Linear):
            raise UserError("backbone.sparse: the blocks are sparse already: begin with a dense network")
        return _Dense(layer.linear1, layer.linear2, layer.activation, replace_layers)
    part: Any = getattr(block, "mlp", None)
    if isinstance(part, SparseFFN):
        raise UserError("backbone.sparse: the blocks are sparse already: begin with a dense network")
    first, second, act = (getattr(part, name, None) for name in ("fc1", "fc2", "act"))
    plain = type(part) is _perceptron() and isinstance(part.norm, nn.Identity)
    if not (plain and isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and act is not None):
        raise UserError(
            f"backbone.sparse: {type(block).__name__} has no plain feed-forward part of two linear layers: choose another network"
        )
    if first.bias is None or second.bias is None:
        raise UserError("backbone.sparse: its feed-forward parts have no biases: choose another network")

    def replace_part(made: SparseFFN) -> None:
        block.mlp = made

    return _Dense(first, second, act, replace_part)
