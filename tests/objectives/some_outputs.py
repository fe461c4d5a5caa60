"""Batches of random outputs, for tests of objectives."""

import torch

from dmoe.objectives import Outputs
from dmoe.tasks import Task

CLASSES = Task("multiclass", num_outputs=4)
B, D, K = 24, 5, 4


def outputs(domains: list[int] | None = None, *, kind: str = "multiclass") -> Outputs:
    """Interleaved domains, three unless told."""
    chosen = torch.tensor(domains or [7, 2, 4] * 8)
    count = len(chosen)
    labels = torch.randint(K, (count,)) if kind == "multiclass" else torch.randint(2, (count,))
    logits = 2 * torch.randn(count, K if kind == "multiclass" else 1, dtype=torch.float64)
    features = torch.randn(count, D, dtype=torch.float64) * (1 + chosen[:, None])
    return Outputs(features.requires_grad_(), logits.requires_grad_(), labels, chosen)
