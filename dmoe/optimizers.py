"""Adam with the schedules of the published recipes; a learning rate is a pure function of the step."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dmoe.config import OptimizerConfig

SKIPPED = "skipped"
"""The scalar, 1, of a step that left everything as it was, because its loss or gradient was no finite number."""


class ScheduledAdam:
    """Adam whose learning rate and gradient norm follow an :class:`OptimizerConfig`."""

    def __init__(self, parameters: Iterable[Tensor], config: OptimizerConfig, *, steps: int, steps_per_epoch: int) -> None:
        """
        Args:
            steps: of the whole training; the cosine ends there.
        """
        self.parameters = list(parameters)
        self._config, self._steps, self._steps_per_epoch = config, steps, steps_per_epoch
        self.restart()

    def restart(self) -> None:
        """Forget the moments."""
        self.adam = torch.optim.Adam(self.parameters, lr=self._config.lr, weight_decay=self._config.l2, fused=True)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        config = self._config
        warmup = config.warmup.steps(self._steps_per_epoch)
        if step < warmup:
            return config.lr * (step + 1) / warmup
        if config.schedule == "exponential":
            return config.lr * config.decay_per_epoch ** (step // self._steps_per_epoch)
        if config.schedule == "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self._steps - warmup)))
        return config.lr

    def clip(self) -> float:
        """Scale down the gradients that the parameters hold to the configured norm; returns their norm before that."""
        limit = self._config.max_gradient_norm
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf))

    def step(self, step: int) -> None:
        """Apply the gradients that the parameters hold, and clear them."""
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(step)
        self._align()
        self.adam.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad()

    def _align(self) -> None:
        """Lay out gradients and moments in memory as their parameters are: the fused Adam pairs numbers by where they lie."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = _like(parameter.grad, parameter)
            state = self.adam.state.get(parameter, {})
            for key, value in state.items():
                state[key] = _like(value, parameter) if value.shape == parameter.shape else value


def step_if_finite(step: int, values: Mapping[str, float], optimizers: Mapping[str, ScheduledAdam]) -> dict[str, float]:
    """Clip and apply the gradients, unless one of them, or a value, is no finite number: then they are dropped and nothing changes.

    Args:
        values: scalars of the step, the loss among them.
        optimizers: by the names that the norms of their gradients go by.

    Returns:
        The values, the norms, and :data:`SKIPPED` where nothing was changed.
    """
    found = {**values, **{name: optimizer.clip() for name, optimizer in optimizers.items()}}
    finite = all(map(math.isfinite, found.values()))
    for optimizer in optimizers.values():
        if finite:
            optimizer.step(step)
        else:
            optimizer.clear()
    return found if finite else {**found, SKIPPED: 1.0}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)
