"""A feed-forward layer of many experts, few of which work on a token.

Notation: T tokens of width d, E experts of hidden width h, k chosen for each token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmoe.models.sparse.grouped import grouped_linear
from dmoe.models.sparse.routing import Routing, Weighting, as_fine, balance_loss, route


class Experts(NamedTuple):
    """Weights of E experts, ``FFN_e(x) = act(x w1_e + b1_e) w2_e + b2_e``.

    Attributes:
        w1: ``[E, d, h]``.
        b1: ``[E, h]``.
        w2: ``[E, h, d]``.
        b2: ``[E, d]``; or ``[d]``, of which each of a token's k experts adds one k-th.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class SparseFFN(nn.Module):
    """``y = sum over the chosen e of g_e FFN_e(x)``.

    Tokens are sorted by expert, and an expert works on all of its tokens in one product. Where numbers of tokens cannot be asked
    for (under ``vmap``, on the meta device), every expert works on all tokens, and those that were not chosen count for nothing:
    the same result, at E / k times the work.

    Attributes:
        router: ``[T, d]`` to logits ``[T, E]``; None: x times the mean of the expert's columns of w1, which is not learned.
        balance_weight: of the balance loss, see :func:`balance_of`.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        act: Callable[[Tensor], Tensor],
        router: nn.Module | None,
        top_k: int,
        weighting: Weighting,
        capacity_factor: float | None = None,
        gate_noise: float = 0.0,
        balance_weight: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            weighting, capacity_factor: see :func:`~dmoe.models.sparse.routing.route`.
            gate_noise: in training mode only.
            dropout: behind ``act``, in training mode.

        Raises:
            ValueError: there are not so many experts, or a balance loss is to be had without noise.
        """
        super().__init__()
        if not 1 <= top_k <= len(experts.w1):
            raise ValueError(f"top_k must be 1 to {len(experts.w1)}, got {top_k}")
        if balance_weight and not gate_noise:
            raise ValueError("balance_weight must be 0 where gate_noise is 0")
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(tensor) for tensor in experts)
        self.act, self.router, self.top_k, self.weighting = act, router, top_k, weighting
        self.capacity_factor, self.gate_noise = capacity_factor, gate_noise
        self.balance_weight, self.dropout = balance_weight, dropout
        self._told: Callable[[Routing], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to the same shape; all leading dimensions are tokens of one batch."""
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            fine = as_fine(tokens)
            logits = fine @ as_fine(self.w1.detach().mean(dim=2)).T if self.router is None else self.router(fine)
            routing = route(
                logits,
                top_k=self.top_k,
                weighting=self.weighting,
                noise=self.gate_noise if self.training else 0.0,
                capacity_factor=self.capacity_factor,
            )
        if self._told is not None:
            self._told(routing)
        try:
            asked = self._asked_for(routing)
            sizes = asked.new_zeros(len(self.w1) + 1).scatter_add(0, asked, torch.ones_like(asked)).tolist()
        except RuntimeError:  # data-dependent numbers are not to be had
            found = self._by_all(tokens, routing)
        else:
            found = self._by_chosen(tokens, routing, sizes)
        if self.b2.ndim == 1:
            found = found + self.b2 * (routing.gates.sum(dim=1, keepdim=True) / self.top_k)
        return found.to(x.dtype).reshape(x.shape)

    def _asked_for(self, routing: Routing) -> Tensor:
        """The expert of each choice, ``[T k]``; E where it is not served."""
        asked = routing.experts if routing.served is None else routing.experts.where(routing.served, len(self.w1))
        return asked.flatten()

    def _by_chosen(self, tokens: Tensor, routing: Routing, sizes: list[int]) -> Tensor:
        """``[T, d]``; ``sizes`` says how many tokens each expert has, and last how many choices are not served."""
        count, width = tokens.shape
        order = self._asked_for(routing).argsort(stable=True)
        # Each row is taken once, so that its gradient is a sum in a fixed order.
        rows = tokens[:, None].expand(count, self.top_k, width).reshape(-1, width).index_select(0, order)
        served = self._ffn(rows[: count * self.top_k - sizes[-1]], sizes[:-1])
        served = served * routing.gates.flatten().index_select(0, order[: len(served)])[:, None]
        if sizes[-1]:
            served = torch.cat([served, served.new_zeros(sizes[-1], width)])
        found = served.index_select(0, order.argsort())
        return found if self.top_k == 1 else found.view(count, self.top_k, width).sum(dim=1)

    def _by_all(self, tokens: Tensor, routing: Routing) -> Tensor:
        """``[T, d]``, by way of ``[E, T, h]``."""
        weights = torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)  # [T, E]
        hidden = self._dropped(self.act(torch.matmul(tokens, self.w1) + self.b1[:, None]))
        said = torch.matmul(hidden, self.w2)
        if self.b2.ndim == 2:
            said = said + self.b2[:, None]
        return (said * weights.T[:, :, None]).sum(dim=0)

    def _ffn(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Of ``[S, d]``, the rows of an expert behind those of another."""
        hidden = self._dropped(self.act(grouped_linear(rows, self.w1, self.b1, sizes)))
        return grouped_linear(hidden, self.w2, None if self.b2.ndim == 1 else self.b2, sizes)

    def _dropped(self, hidden: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return hidden
        # A byte a unit is remembered; torch's own dropout remembers a float on a CPU.
        dropped = torch.empty_like(hidden, dtype=torch.bool).bernoulli_(self.dropout)
        return hidden.masked_fill(dropped, 0) * (1 / (1 - self.dropout))

    def extra_repr(self) -> str:
        experts, width, hidden = self.w1.shape
        return f"{top(self.top_k, experts)}, width={width}, hidden={hidden}, capacity_factor={self.capacity_factor}"


def top(top_k: int, experts: int) -> str:
    """In words."""
    return f"{top_k} of {experts} experts"


def sparse_layers(module: nn.Module) -> dict[str, SparseFFN]:
    """The sparse layers inside a module, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, SparseFFN)}


@contextmanager
def routings(module: nn.Module) -> Iterator[dict[str, Routing]]:
    """Meanwhile, the routing of each sparse layer's last forward pass is put down under its name, with its graph."""
    layers, found = sparse_layers(module), dict[str, Routing]()
    before = {name: layer._told for name, layer in layers.items()}
    for name, layer in layers.items():
        layer._told = lambda routing, name=name: found.update({name: routing})
    try:
        yield found
    finally:
        for name, layer in layers.items():
            layer._told = before[name]


def balance_of(module: nn.Module, found: dict[str, Routing]) -> Tensor | None:
    """The weighted sum of the layers' balance losses, by what :func:`routings` put down in training; None: no layer has one."""
    layers = sparse_layers(module)
    each = [layers[name].balance_weight * balance_loss(one) for name, one in found.items() if layers[name].balance_weight]
    return torch.stack(each).sum() if each else None
