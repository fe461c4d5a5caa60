"""Which experts a token goes to, with what weight, and how evenly tokens are spread.

Notation: T tokens of width d, E experts, k chosen for each token.
Sources: Shazeer et al., *Outrageously large neural networks*, ICLR 2017 (noise, importance and load); Riquelme et al., *Scaling
vision with sparse mixture of experts*, NeurIPS 2021 (batch-prioritised routing); Chi et al., *On the representation collapse of
sparse mixture of experts*, NeurIPS 2022 (cosine router); Li et al., *Sparse mixture-of-experts are domain generalizable
learners*, ICLR 2023; Qiu et al., *Unlocking emergent modularity in large language models*, 2023 (average keys).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weighting = Literal["probability", "one", "mean_one"]
"""Of the chosen experts. probability: p, for k > 1 divided by its sum. one: 1. mean_one: k times the first, for k > 1."""


class Routing(NamedTuple):
    """Where tokens went.

    Attributes:
        logits: the router's, without noise, ``[T, E]``.
        noisy: those that decided, ``[T, E]``; the same tensor where there was no noise.
        experts: the chosen ones, the best first, ``[T, k]``.
        gates: their weights, 0 where a token was turned away, ``[T, k]``.
        served: whether the expert had room for the token, ``[T, k]``; None: it had room for all.
        noise: standard deviation of the noise, times E.
    """

    logits: Tensor
    noisy: Tensor
    experts: Tensor
    gates: Tensor
    served: Tensor | None
    noise: float

    @property
    def load(self) -> Tensor:
        """How many tokens each expert served, ``[E]``."""
        chosen = self.experts if self.served is None else self.experts[self.served]
        return torch.bincount(chosen.flatten(), minlength=self.logits.shape[1])


class LinearRouter(nn.Module):
    """logits = x W, without bias."""

    def __init__(self, *, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        """``[T, d]`` to logits ``[T, E]``."""
        return F.linear(tokens, as_fine(self.weight))


class CosineRouter(nn.Module):
    """logits = s cos(x W + b, code of the expert); the scale s is learned, 2 at first and 100 at most."""

    LARGEST = math.log(100)

    def __init__(self, *, width: int, experts: int, projected: int = 256) -> None:
        super().__init__()
        self.projection = nn.Linear(width, projected)
        self.codes = nn.Parameter(0.01 * torch.randn(projected, experts))
        self.log_scale = nn.Parameter(torch.full((1,), math.log(2)))

    def forward(self, tokens: Tensor) -> Tensor:
        """``[T, d]`` to logits ``[T, E]``."""
        projected = F.linear(tokens, as_fine(self.projection.weight), as_fine(self.projection.bias))
        length: Tensor = torch.linalg.vector_norm(projected, dim=1, keepdim=True).clamp_min(1e-12)
        cosines = (projected @ F.normalize(as_fine(self.codes), dim=0)) / length  # only [T, E] is divided, and remembered
        return cosines * as_fine(self.log_scale).clamp(max=self.LARGEST).exp()


def as_fine(values: Tensor) -> Tensor:
    """In float32 at least, as routers compute."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def route(logits: Tensor, *, top_k: int, weighting: Weighting, noise: float = 0.0, capacity_factor: float | None = None) -> Routing:
    """The routing that logits ``[T, E]`` ask for.

    Args:
        noise: N(0, 1) times this, divided by E, is added to the logits; from torch's generator.
        capacity_factor: see :func:`capacity`; None: every expert takes all that come.
    """
    tokens, experts = logits.shape
    noisy = logits + torch.randn_like(logits) * (noise / experts) if noise else logits
    found = noisy.topk(top_k, dim=1).indices
    probabilities = noisy.softmax(dim=1)
    if weighting == "one":
        gates = torch.ones_like(probabilities[:, :top_k])
    else:
        gates = probabilities.gather(1, found)
        if top_k > 1:
            gates = gates / gates.sum(dim=1, keepdim=True)
            gates = gates * top_k if weighting == "mean_one" else gates
    served = None
    if capacity_factor is not None:
        room = capacity(tokens, experts, top_k, capacity_factor)
        served = _served(found, probabilities.detach().amax(dim=1), experts, room)
        gates = gates * served
    return Routing(logits, noisy, found, gates, served, noise)


def capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """How many tokens an expert takes at most."""
    return top_k * int(factor * math.ceil(tokens / experts))


def _served(found: Tensor, priority: Tensor, experts: int, room: int) -> Tensor:
    """Whether there is room for each choice, ``[T, k]``: all first choices are served before second ones, and among equal choices
    tokens with the highest priority ``[T]`` before others."""
    tokens, top_k = found.shape
    order = priority.argsort(descending=True, stable=True)
    queue = found.gather(0, order[:, None].expand(tokens, top_k)).T.flatten()
    asks = (queue[:, None] == torch.arange(experts, device=queue.device)).long()  # [k T, E]
    before = ((asks.cumsum(dim=0) - 1) * asks).sum(dim=1)
    in_order = (before < room).view(top_k, tokens).T
    return in_order.gather(0, order.argsort()[:, None].expand(tokens, top_k))


def balance_loss(routing: Routing) -> Tensor:
    """(importance + load) / 2, each the squared coefficient of variation over experts; 0 where all are used alike.

    Importance is the sum over tokens of p, without noise; load the sum of the probability that p exceeds what was the token's
    k-th chosen noisy logit (a logit, as in the public code of GMoE), were the noise drawn anew.

    Raises:
        ValueError: the routing was without noise.
    """
    if not routing.noise:
        raise ValueError("balance_loss needs gate noise: load is a probability under it")
    p = routing.logits.softmax(dim=1)
    threshold = routing.noisy.gather(1, routing.experts)[:, -1:]
    load = torch.special.ndtr((p - threshold) * (p.shape[1] / routing.noise))
    return (_variation(p.sum(dim=0)) + _variation(load.sum(dim=0))) / 2


def _variation(values: Tensor) -> Tensor:
    return values.var() / (values.mean().square() + 1e-10)
