"""The mean of the weights of many steps, from where the validation loss stops falling to where it begins to rise."""

import torch
from torch import Tensor, nn

from dmoe.objectives.erm import ERM
from dmoe.tasks import Task


class SWAD(nn.Module, ERM):
    """The task loss, and in the end the mean of the weights of all steps in a window that the validation losses choose.

    The window begins at a loss that the next ones do not fall below. It ends with the last loss of at most ``tolerance`` times the
    mean of these first ones, once ``end_patience`` later ones in a row are above that, and otherwise with the training.
    Source: Cha et al., *SWAD: Domain generalization by seeking flat minima*, NeurIPS 2021, algorithm 1. The losses that a window
    begins with are never outside of it. Where none began, it is from the lowest loss on. Statistics of batch-norm are averaged as
    weights are.
    """

    average: Tensor
    pending: Tensor
    counts: Tensor
    losses: Tensor
    progress: Tensor

    def __init__(self, task: Task, *, network: nn.Module, start_patience: int, end_patience: int, tolerance: float) -> None:
        """
        Args:
            network: which is to be trained.
            start_patience: losses of which the first is to be the lowest (the paper: 3).
            end_patience: see above (the paper: 6).
            tolerance: see above (the paper: 1.3, or 1.2).
        """
        nn.Module.__init__(self)
        ERM.__init__(self, task)
        self._end_patience, self._tolerance = end_patience, tolerance
        size = len(_flat(network))
        self.register_buffer("average", torch.zeros(size))  # of the window so far
        self.register_buffer("pending", torch.zeros(size))  # of the steps since, which are of the window if another loss is low
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))  # steps in each of the two
        self.register_buffer("losses", torch.zeros(start_patience, dtype=torch.float64))
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))  # losses since the lowest, and in a row above the limit

    def stepped(self, network: nn.Module) -> None:
        """Take the weights of one more step."""
        if self._has_ended:
            return
        mean, count = (self.pending, self.counts[1]) if self._has_begun else (self.average, self.counts[0])
        count += 1
        mean.lerp_(_flat(network), 1 / int(count))

    def evaluated(self, network: nn.Module, loss: float) -> None:
        """Take the validation loss of the weights that were taken last."""
        since, above = self.progress.tolist()
        if self._has_ended:
            return
        if self._has_begun:
            low = loss <= self._tolerance * float(self.losses.mean())
            self.progress[1] = 0 if low else above + 1
            if low:
                self._take_pending()
            return
        if since == 0 or loss < self.losses[0]:
            since = 0
            self.average.copy_(_flat(network))
            self.counts[0] = 1
        self.losses[since] = loss
        self.progress[0] = since + 1

    def settle(self, network: nn.Module) -> None:
        """Put the mean over the window into the network, at the end of the training."""
        if not self._has_ended:
            self._take_pending()
        if self.counts[0] > 0:
            _fill(network, self.average)

    @property
    def _has_begun(self) -> bool:
        return int(self.progress[0]) == len(self.losses)

    @property
    def _has_ended(self) -> bool:
        return int(self.progress[1]) >= self._end_patience

    def _take_pending(self) -> None:
        taken, more = self.counts.tolist()
        if more:
            self.average.lerp_(self.pending, more / (taken + more))
            self.counts.copy_(torch.tensor([taken + more, 0]))


def _flat(network: nn.Module) -> Tensor:
    """All numbers of a network that are not whole, in a row."""
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values() if tensor.is_floating_point()])


def _fill(network: nn.Module, numbers: Tensor) -> None:
    """What :func:`_flat` made, back in its places."""
    tensors = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    for tensor, part in zip(tensors, numbers.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
