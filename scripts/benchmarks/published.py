"""The published way, written out plainly: the frozen experts again at every step, double backward through a kept graph.

Tensors are laid out as the public code has them, channels first, and the allocator is as it comes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmoe.meta.gradient import Loss
from dmoe.models.aggregator import Aggregator
from dmoe.models.expert_pool import without_own_expert
from dmoe.models.networks import Network
from scripts.benchmarks.inputs import CLASSES, INNER_LR, LR, Episode, new_aggregator
from scripts.benchmarks.measuring import Step


def live_tokens(experts: Sequence[Network], images: Tensor) -> Tensor:
    """Tokens ``[B, N, D]``, by every expert in turn."""
    with torch.no_grad():
        return torch.stack([expert.features(images) for expert in experts], dim=1)


@sdpa_kernel(SDPBackend.MATH)  # the fused kernels of attention cannot be differentiated twice
def add_meta_gradients(
    student: Network,
    teacher: nn.Module,
    tokens: Tensor,
    support: Tensor,
    query: Tensor,
    labels: Tensor,
    *,
    inner_lr: float,
    inner_steps: int = 1,
    share: float = 1.0,
    query_before: bool = True,
    loss: Loss = F.cross_entropy,
) -> None:
    """Add ``share`` of an episode's outer gradient to ``.grad`` of everything that learns, from masked tokens.

    ``query_before``: the loss before adapting, which the public code writes into a log. Its graph lives until the step ends, as it
    does there.
    """
    theta: dict[str, Any] = dict(student.features.named_parameters())
    buffers = dict(student.features.named_buffers())

    def features(parameters: dict[str, Any], images: Tensor) -> Tensor:
        found: Tensor = functional_call(student.features, (parameters, buffers), (images,))
        return found

    target = teacher(tokens)
    before = student.head(features(theta, query)) if query_before else None
    if before is not None:
        with torch.no_grad():
            loss(before, labels).item()
    for _ in range(inner_steps):
        inner = (features(theta, support) - target).square().mean()
        gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        theta = {name: value - inner_lr * g for (name, value), g in zip(theta.items(), gradients, strict=True)}
    (share * loss(student.head(features(theta, query)), labels)).backward()


def meta_step(episode: Episode, *, live: bool = True, query_before: bool = True) -> Step:
    """One meta-training step; ``live=False`` leaves the experts out, where only the way to the gradient is compared."""
    student, teacher = episode.student, episode.teacher
    experts = episode.experts() if live else []
    adams = _adams(student, teacher)

    def step() -> None:
        tokens = live_tokens(experts, episode.x_support) if live else episode.tokens
        add_meta_gradients(
            student,
            teacher,
            without_own_expert(tokens, episode.own),
            episode.x_support,
            episode.x_query,
            episode.labels,
            inner_lr=INNER_LR,
            inner_steps=episode.setting.inner_steps,
            query_before=query_before,
        )
        for adam in adams:
            adam.step()
            adam.zero_grad()

    return step


def meta_step_by_higher(episode: Episode) -> Step:
    """The same step through the library ``higher``, from stored tokens."""
    import higher

    student, teacher = episode.student, episode.teacher
    adams = _adams(student, teacher)
    inner = torch.optim.SGD(student.features.parameters(), lr=INNER_LR)

    def step() -> None:
        target = teacher(without_own_expert(episode.tokens, episode.own))
        with higher.innerloop_ctx(student.features, inner, copy_initial_weights=False) as (features, descent):
            for _ in range(episode.setting.inner_steps):
                descent.step((features(episode.x_support) - target).square().mean())
            F.cross_entropy(student.head(features(episode.x_query)), episode.labels).backward()
        for adam in adams:
            adam.step()
            adam.zero_grad()

    return step


def aggregator_step(episode: Episode) -> Step:
    """One step of aggregator pretraining on the support images."""
    experts, teacher = episode.experts(), new_aggregator(episode.student.width, episode.device, episode.dtype).train()
    labels = torch.randint(CLASSES, (episode.setting.support,), device=episode.device)
    adam = torch.optim.Adam(teacher.parameters(), lr=LR)

    def step() -> None:
        F.cross_entropy(teacher.logits(live_tokens(experts, episode.x_support)), labels).backward()
        adam.step()
        adam.zero_grad()

    return step


def _adams(student: Network, teacher: Aggregator) -> list[torch.optim.Adam]:
    return [torch.optim.Adam(module.parameters(), lr=LR) for module in (student, teacher)]
