"""ARM by batch-norm statistics: trained, as it is tested, with those of the support images.

Source: Zhang et al., *Adaptive risk minimization*, NeurIPS 2021, section 4.1, ARM-BN.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.baselines.arm import Arm
from dmoe.baselines.batch_statistics import BatchStatistics
from dmoe.errors import DoesNotApply
from dmoe.models.copying import private_copy
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.tasks import Task


class ArmBn(Arm):
    """Adapting is that of :class:`~dmoe.baselines.batch_statistics.BatchStatistics`; training goes through it."""

    def __init__(self, network: Network, *, task: Task) -> None:
        """
        Raises:
            DoesNotApply: the network has no batch-norm layer.
        """
        super().__init__()
        self.network, self._task = network, task
        twin, self._norms = private_copy(network), list[_SupportNorm]()
        for name, module in list(twin.named_modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._norms.append(_SupportNorm(module))
                twin.set_submodule(name, self._norms[-1])
        if not self._norms:
            raise DoesNotApply("ARM-BN: the network has no batch-norm layer to adapt: choose another backbone")
        self._twin = (twin,)  # in a tuple, so that tensors which it shares with the network are not counted twice

    def query_logits(self, support: Tensor, query: Sequence[Tensor]) -> Tensor:
        (twin,), logits = self._twin, list[Tensor]()
        for unlabeled, images in zip(support, query, strict=True):
            self._forget()
            twin(unlabeled)
            logits.append(twin(images))
        self._forget()
        return torch.cat(logits)

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """See :meth:`Arm.adapt`; statistics are of these images alone, whatever came before."""
        return BatchStatistics(Student(features=self.network.features, head=self.network.head, task=self._task)).adapt(images)

    def _forget(self) -> None:
        for norm in self._norms:
            norm.taken = None


class _SupportNorm(nn.Module):
    """Normalises the first batch by its own statistics, as in training, and others by the same ones."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.taken: tuple[Tensor, Tensor] | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.taken is None:
            self.taken = torch.var_mean(values, dim=[0, *range(2, values.ndim)], correction=0)
            return F.batch_norm(values, None, None, self.weight, self.bias, training=True, eps=self.eps)
        variance, mean = self.taken
        scale = (variance + self.eps).rsqrt() * (1.0 if self.weight is None else self.weight)
        shift = -mean * scale + (0.0 if self.bias is None else self.bias)
        shape = (-1, *[1] * (values.ndim - 2))
        return values * scale.view(shape) + shift.view(shape)
