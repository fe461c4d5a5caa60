"""What several methods share: classes where there is only one logit, entropies, layers of normalisation and their statistics.

Notation: B images, K classes (2 for a binary task).
"""

import torch
from torch import Tensor, nn

from dmoe.errors import DoesNotApply
from dmoe.models.copying import private_copy
from dmoe.tasks import Task

BatchNorm = nn.modules.batchnorm._BatchNorm
NORMS = (BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def require_classes(method: str, task: Task) -> None:
    """
    Raises:
        DoesNotApply: the task is a regression.
    """
    if task.kind == "regression":
        raise DoesNotApply(f"{method}: needs classes; this task is a regression: leave this method out")


def class_logits(logits: Tensor, task: Task) -> Tensor:
    """Logits ``[B, K]`` of which the softmax is the task's probabilities; a single logit becomes two, the first of them 0."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if task.kind == "binary" else logits


def task_logits(logits: Tensor, task: Task) -> Tensor:
    """The way back from :func:`class_logits`."""
    return logits[:, 1:] - logits[:, :1] if task.kind == "binary" else logits


def entropies(logits: Tensor) -> Tensor:
    """The entropy of each prediction in nats, from logits ``[..., K]``."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def norm_parameters(method: str, features: nn.Module) -> list[str]:
    """The names of weights and biases of all layers of normalisation.

    Raises:
        DoesNotApply: there are none.
    """
    layers = [(prefix, layer) for prefix, layer in features.named_modules() if isinstance(layer, NORMS)]
    names = [f"{prefix}.{name}".lstrip(".") for prefix, layer in layers for name, _ in layer.named_parameters(recurse=False)]
    if not names:
        raise DoesNotApply(
            f"{method}: adapts layers of normalisation, and this network has none with weights: leave this method out"
        )
    return names


def normalising_by_batch(module: nn.Module) -> nn.Module:
    """The module itself, its batch-norm layers from now on going by the batch at hand, of which they remember nothing."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.training, layer.track_running_stats = True, False
    return module


@torch.no_grad()
def with_statistics_of(images: Tensor, features: nn.Module, *, source_weight: float = 0.0) -> nn.Module:
    """A copy of ``features`` of which the batch-norm layers go by mean and variance of ``images`` ``[B, C, H, W]``.

    Layer by layer: each one normalises by its new statistics before the next one's are taken. Variances are the biased ones that
    batch-norm normalises by in training, so that the images themselves come out as in one pass in training mode.

    Args:
        source_weight: how many images the statistics so far count as in a weighted mean with the new ones, N.

    Source: Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, NeurIPS 2020, eq. 3.
    """
    share = len(images) / (source_weight + len(images))

    def take(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        variance, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        # New tensors, not new numbers in them: the copy shares its tensors with the original.
        layer.running_mean = torch.lerp(layer.get_buffer("running_mean"), mean, share)
        layer.running_var = torch.lerp(layer.get_buffer("running_var"), variance, share)

    features = private_copy(features)
    layers = [layer for layer in features.modules() if isinstance(layer, BatchNorm) and layer.running_mean is not None]
    hooks = [layer.register_forward_pre_hook(take) for layer in layers]
    features(images)
    for hook in hooks:
        hook.remove()
    return features
