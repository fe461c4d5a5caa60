"""The task loss; and what all objectives are given."""

import torch
import torch.nn.functional as F
from some_outputs import CLASSES, outputs
from torch import Tensor

from dmoe.objectives import ERM


def test_erm_is_the_task_loss() -> None:
    batch = outputs()
    assert torch.equal(ERM(CLASSES).loss(batch, step=0), F.cross_entropy(batch.logits, batch.labels))


def test_parts_by_domain_are_all_images_of_it() -> None:
    batch = outputs()
    found: dict[int, Tensor] = {int(part.domains[0]): part.logits for part in batch.by_domain()}
    assert list(found) == [2, 4, 7]
    assert all(torch.equal(logits, batch.logits[batch.domains == domain]) for domain, logits in found.items())
