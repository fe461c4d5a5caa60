"""Steps that lead down in one domain after the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmoe.objectives.erm import ERM
from dmoe.tasks import Task


class Fish(ERM):
    """The task loss of each domain in turn; what is followed is the way that these inner steps go.

    To first order, and over all orders of domains, that is the gradient of the sum of their losses, less ``inner_lr / 2`` times the
    inner product of each pair's gradients, divided by E.
    Source: Shi et al., *Gradient matching for domain generalization*, ICLR 2022. Inner steps are plain gradient descent; of the
    way from start to end point no fixed part is gone, but the optimizer is given it as a gradient.
    """

    def __init__(self, task: Task, *, inner_lr: float) -> None:
        """
        Args:
            inner_lr: of the inner steps; towards 0, this becomes ERM.
        """
        super().__init__(task)
        self._inner_lr = inner_lr

    def gradient(self, loss: Callable[..., Tensor], tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The mean of the gradients that the inner steps followed; the parameters are then where they were.

        Args:
            tensors: the last of them says the domain of each image; inner steps are in the order in which domains come.
        """
        domains = tensors[-1]
        begun = [parameter.detach().clone() for parameter in parameters]
        losses = []
        order = list(dict.fromkeys(domains.tolist()))
        for domain in order:
            part = loss(*(tensor[domains == domain] for tensor in tensors))
            found = torch.autograd.grad(part, list(parameters), allow_unused=True)
            losses.append(part.detach())
            with torch.no_grad():
                for parameter, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        parameter.sub_(self._inner_lr * gradient)
                        share = gradient / len(order)
                        parameter.grad = share if parameter.grad is None else parameter.grad + share
        with torch.no_grad():
            for parameter, value in zip(parameters, begun, strict=True):
                parameter.copy_(value)
        return torch.stack(losses).mean()
