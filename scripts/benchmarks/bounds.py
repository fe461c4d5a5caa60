"""What cannot be left out: the forward and backward passes by themselves, with nothing around them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmoe.meta.gradient import distillation_loss
from dmoe.meta.learner import Way
from dmoe.models.networks import in_layout
from scripts.benchmarks import ours
from scripts.benchmarks.inputs import Episode, as_delivered
from scripts.benchmarks.measuring import Step


def meta_passes(episode: Episode, *, way: Way) -> Step:
    """One inner gradient, one Hessian-vector product and one query gradient of the plain network; chunks and layout as ours."""
    chunk_size, student = way.chunk_size, in_layout(episode.student, way.layout)
    features, head = student.features, student.head
    buffers = dict(features.named_buffers())
    theta = {name: value.detach() for name, value in features.named_parameters()}
    target = torch.randn(episode.setting.support, episode.student.width, device=episode.device, dtype=episode.dtype)
    v = {name: torch.randn_like(value) for name, value in theta.items()}
    support, query = (images.contiguous(memory_format=way.layout) for images in (episode.x_support, episode.x_query))
    del episode.x_support, episode.x_query

    def inner(p: Mapping[str, Tensor], images: Tensor, t: Tensor) -> Tensor:
        return distillation_loss(functional_call(features, (dict(p), buffers), (images,)), t)

    @sdpa_kernel(SDPBackend.MATH)
    def step() -> None:
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        wanted = list(leaves.values())
        for images, t in zip(support.split(chunk_size or len(support)), target.split(chunk_size or len(target)), strict=True):
            torch.autograd.grad(inner(leaves, images, t), wanted)
            gradients = torch.autograd.grad(inner(leaves, images, t), wanted, create_graph=True)
            along = torch.stack([(g * d).sum() for g, d in zip(gradients, v.values(), strict=True)]).sum()
            torch.autograd.grad(along, wanted)
            del gradients, along
        for images, y in zip(query.split(chunk_size or len(query)), episode.labels.split(chunk_size or len(query)), strict=True):
            logits = head(functional_call(features, (leaves, buffers), (images,)))
            torch.autograd.grad(F.cross_entropy(logits, y), wanted)

    return step


def adaptation_passes(episode: Episode) -> Step:
    """The experts' forward passes and one gradient of the student."""
    experts, features = ours.experts(episode), in_layout(episode.student, torch.channels_last).features
    parameters, images = list(features.parameters()), as_delivered(episode.x_support)
    target = torch.randn(len(images), episode.student.width, device=episode.device, dtype=episode.dtype)

    def step() -> None:
        with torch.inference_mode():
            for expert in experts:
                expert.features(images)
        torch.autograd.grad((features(images) - target).square().mean(), parameters)

    return step


def forward_passes(episode: Episode, *, batch_size: int) -> Step:
    """Every expert over every support image."""
    experts, images = ours.experts(episode), as_delivered(episode.x_support)

    def step() -> None:
        with torch.inference_mode():
            for part in images.split(batch_size):
                for expert in experts:
                    expert.features(part)

    return step
