"""Sparse mixtures of experts inside one network: a token of an image goes to few of many feed-forward parts of a layer.

Not the experts of Meta-DMoE, which are whole networks. Sources: Li et al., *Sparse mixture-of-experts are domain generalizable
learners*, ICLR 2023 (GMoE); Qiu et al., *Unlocking emergent modularity in large language models*, arXiv 2310.10908 (EMoE).
"""

from dmoe.models.sparse.convert import SparseSettings, make_dense, make_sparse
from dmoe.models.sparse.ffn import SplitFFN
from dmoe.models.sparse.layer import Experts, SparseFFN, balance_of, routings, sparse_layers
from dmoe.models.sparse.routing import CosineRouter, LinearRouter, Routing, balance_loss, capacity, route

__all__ = [
    "CosineRouter",
    "Experts",
    "LinearRouter",
    "Routing",
    "SparseFFN",
    "SparseSettings",
    "SplitFFN",
    "balance_loss",
    "balance_of",
    "capacity",
    "make_dense",
    "make_sparse",
    "route",
    "routings",
    "sparse_layers",
]
