"""From a dense feed-forward part to a sparse one, and back.

Notation: width d, hidden width h, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dmoe.models.sparse.clustering import balanced_clusters
from dmoe.models.sparse.layer import Experts, SparseFFN
from dmoe.models.sparse.routing import Weighting

Act = Callable[[Tensor], Tensor]


class SplitFFN(SparseFFN):
    """A dense feed-forward part, its hidden units shared out among experts; it has the same parameters.

    Attributes:
        units: which hidden units of the dense one each expert has, ``[E, h / E]``.
    """

    units: Tensor

    def __init__(
        self,
        *,
        first: nn.Linear,
        second: nn.Linear,
        units: Tensor,
        act: Act,
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
            first, second: ``[h, d]`` and ``[d, h]``, with biases; they are copied.
            units: every number from 0 to h - 1 once.
        """
        w1, b1, w2, b2 = (tensor.detach() for tensor in (first.weight, first.bias, second.weight, second.bias))
        parts = Experts(w1[units].mT.contiguous(), b1[units], w2.T[units], b2.clone())
        super().__init__(
            parts,
            act=act,
            router=router,
            top_k=top_k,
            weighting=weighting,
            capacity_factor=capacity_factor,
            gate_noise=gate_noise,
            balance_weight=balance_weight,
            dropout=dropout,
        )
        self.register_buffer("units", units)

    def dense(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers that this one is split from, as they are now; bit for bit those it was made of, before any training."""
        experts, width, hidden = self.w1.shape
        first, second = (
            nn.Linear(*sizes, device=self.w1.device, dtype=self.w1.dtype)
            for sizes in ((width, experts * hidden), (experts * hidden, width))
        )
        place = self.units.flatten().argsort()
        with torch.no_grad():
            first.weight.copy_(self.w1.mT.flatten(0, 1)[place])
            first.bias.copy_(self.b1.flatten()[place])
            second.weight.copy_(self.w2.flatten(0, 1)[place].T)
            second.bias.copy_(self.b2)
        return first, second


def copies(first: nn.Linear, second: nn.Linear, experts: int) -> Experts:
    """Experts that are each a copy of the dense part."""
    w1, b1, w2, b2 = (tensor.detach() for tensor in (first.weight.T, first.bias, second.weight.T, second.bias))
    return Experts(*(tensor.expand(experts, *tensor.shape).contiguous() for tensor in (w1, b1, w2, b2)))


def clustered_units(first: nn.Linear, experts: int, *, seed: int = 0) -> Tensor:
    """Hidden units ``[E, h / E]`` whose normalised rows of W1 lie together, each expert's in their order.

    Source: Qiu et al., arXiv 2310.10908, by the clusters of :func:`~dmoe.models.sparse.clustering.balanced_clusters`.
    """
    rows = nn.functional.normalize(first.weight.detach().double(), dim=1).cpu().numpy()
    labels = torch.from_numpy(balanced_clusters(rows, clusters=experts, seed=seed))
    return labels.argsort(stable=True).view(experts, -1).to(first.weight.device)


def consecutive_units(hidden: int, experts: int) -> Tensor:
    """Hidden units ``[E, h / E]`` in their order."""
    return torch.arange(hidden).view(experts, -1)


def blocks_of(where: str | Sequence[int], depth: int) -> list[int]:
    """Numbers of the blocks, from 0, of a network of ``depth`` blocks.

    Args:
        where: ``last_two``: the second and fourth from the end; ``every_two``: these and all others two apart; or numbers.

    Raises:
        ValueError: there are no such blocks.
    """
    if isinstance(where, str):
        found = list(range(depth % 2, depth - 1, 2))
        return found[-2:] if where == "last_two" else found
    for number in where:
        if not 0 <= number < depth:
            raise ValueError(f"there is no block {number}, blocks are 0 to {depth - 1}")
    return sorted(set(where))
