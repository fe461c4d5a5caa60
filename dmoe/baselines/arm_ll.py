"""ARM by a learned loss: gradient steps on what a second network thinks of the logits.

Source: Zhang et al., *Adaptive risk minimization*, NeurIPS 2021, section 4.1, ARM-LL.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.baselines.arm import Arm
from dmoe.models.copying import private_copy, set_parameters
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.tasks import Task


class LossNetwork(nn.Sequential):
    """Logits ``[B, K]`` to a number an image, ``[B, 1]``, by three hidden layers (published: 32 wide)."""

    def __init__(self, *, num_outputs: int, width: int) -> None:
        layers: list[nn.Module] = []
        for inputs in (num_outputs, width, width):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, 1))


class ArmLl(Arm):
    """Features and head take gradient steps that lower the length of the loss network's output vector over the support images.

    Batch-norm goes by the running statistics that the network comes with, in training as in testing; the authors' code goes by
    those of the support in both.
    """

    def __init__(self, network: Network, loss: nn.Module, *, task: Task, inner_lr: float, inner_steps: int = 1) -> None:
        """
        Args:
            loss: ``[B, K] -> [B, 1]``.
            inner_lr: step size (published: 0.1).
        """
        super().__init__()
        self.network, self.loss = network.eval(), loss
        self._task, self._inner_lr, self._inner_steps = task, inner_lr, inner_steps

    def train(self, mode: bool = True) -> "ArmLl":
        super().train(mode)
        self.network.eval()
        return self

    def query_logits(self, support: Tensor, query: Sequence[Tensor]) -> Tensor:
        parameters, logits = dict(self.network.named_parameters()), list[Tensor]()
        for unlabeled, images in zip(support, query, strict=True):
            adapted = self._adapted(self.network, parameters, unlabeled, keep_graph=True)
            logits.append(functional_call(self.network, adapted, (images,)))
        return torch.cat(logits)

    @torch.enable_grad()
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """See :meth:`Arm.adapt`; the steps begin at ``start``."""
        begin = start or Student(features=self.network.features, head=self.network.head, task=self._task)
        features, head = private_copy(begin.features), private_copy(begin.head)
        whole = nn.Sequential(features, head)
        before = {name: value.detach().requires_grad_() for name, value in whole.named_parameters()}
        after = self._adapted(whole, before, images.to(begin.device), keep_graph=False)
        set_parameters(whole, {name: value.detach() for name, value in after.items()})
        return Student(features=features, head=head, task=self._task)

    def _adapted(
        self, network: nn.Module, parameters: Mapping[str, Tensor], images: Tensor, *, keep_graph: bool
    ) -> dict[str, Tensor]:
        """Parameters of ``network`` after the steps on images ``[S, C, H, W]``."""
        point = dict(parameters)
        for _ in range(self._inner_steps):
            length = torch.linalg.vector_norm(self.loss(functional_call(network, point, (images,))))
            gradients = torch.autograd.grad(length, list(point.values()), create_graph=keep_graph)
            point = {name: value - self._inner_lr * g for (name, value), g in zip(point.items(), gradients, strict=True)}
        return point
