"""Backbones by name, each as features and head: experts and students are built here.

Notation: images ``[B, C, H, W]``, features ``[B, D]``, logits ``[B, K]``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.artifacts import load_into, load_tensors
from dmoe.errors import UserError
from dmoe.models.sparse.convert import SparseSettings, make_sparse
from dmoe.models.sparse.foreign import as_features, holds_sparse
from dmoe.models.torchvision_import import torchvision


class Network(nn.Module):
    """A classifier in two parts. ``features`` is what is distilled and adapted; ``head`` is linear.

    Attributes:
        features: ``[B, C, H, W] -> [B, D]``.
        head: ``[B, D] -> [B, K]``.
    """

    def __init__(self, *, features: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.head = head

    @property
    def width(self) -> int:
        """D, the number of features."""
        return self.head.in_features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


SMALL = 512
"""Edge of an image in pixels; the last layer of :class:`SmallConv` has a weight for each place."""

SMALL_PATCHES = 64
"""Edge of an image in pixels; every patch of :func:`small_vit` looks at all others."""

BY_OTHER_NAMES = {"gmoe_vit_s16": "timm:deit_small_patch16_224", "gmoe_vit_b16": "timm:deit_base_patch16_224"}
"""Sparse networks, and the dense ones that they are made of."""


class SmallConv(nn.Sequential):
    """Four 3x3 convolutions with batch-norm for images of about 14x14; a linear layer sees where things are.

    No global pooling: what the student has to learn about a domain is where the top of an image is.
    """

    def __init__(self, *, image_shape: tuple[int, int, int], width: int = 64) -> None:
        channels, *size = image_shape
        height, breadth = (-(-edge // 4) for edge in size)
        layers = _convolutions(channels, ((16, 1), (32, 2), (64, 2), (64, 1)))
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * height * breadth, width))


def _convolutions(channels: int, stages: Sequence[tuple[int, int]]) -> list[nn.Module]:
    """3x3 convolutions of so many filters and such strides, each with batch-norm and ReLU."""
    layers: list[nn.Module] = []
    for filters, stride in stages:
        layers += [nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
        channels = filters
    return layers


def small_vit(*, image_shape: tuple[int, int, int], width: int = 64) -> nn.Module:
    """A vision transformer for images of about 14x14: convolutions make patches of 4x4 pixels; two blocks of four heads; mean.

    Source: convolutions in the place of one of the patch's size, Xiao et al., *Early convolutions help transformers see better*,
    NeurIPS 2021. Patches at the right and lower edge may reach beyond the image.
    """
    torchvision()  # timm imports it
    from timm.models.vision_transformer import VisionTransformer

    channels, *size = image_shape
    made: nn.Module = VisionTransformer(
        img_size=tuple(size),
        in_chans=channels,
        num_classes=0,
        global_pool="avg",
        class_token=False,
        embed_dim=width,
        depth=2,
        num_heads=4,
        embed_layer=EarlyConvolutions,
    )
    return made


class EarlyConvolutions(nn.Module):
    """Images to patches of 4x4 pixels, ``[B, C, H, W]`` to ``[B, patches, width]``.

    Attributes:
        grid_size: rows and columns of patches.
    """

    def __init__(self, *, img_size: tuple[int, int], in_chans: int, embed_dim: int, **_: Any) -> None:
        """The names are timm's, of what may stand in a transformer's ``embed_layer``."""
        super().__init__()
        layers = _convolutions(in_chans, ((16, 1), (32, 2), (embed_dim, 2)))
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        height, breadth = (-(-edge // 4) for edge in img_size)
        self.grid_size, self.num_patches = (height, breadth), height * breadth

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).mT


class PooledDenseNet(nn.Sequential):
    """DenseNet features, averaged over the image.

    torchvision applies a ReLU after the last norm, outside of its module list. The public code of Meta-DMoE is made of
    the modules and pools without it; ``last_relu=False`` does the same, and its checkpoints need it.
    """

    def __init__(self, convolutions: nn.Module, *, last_relu: bool) -> None:
        super().__init__(convolutions, *([nn.ReLU()] if last_relu else []), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_network(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_outputs: int,
    weights: str = "none",
    last_relu: bool = True,
    sparse: SparseSettings | None = None,
) -> Network:
    """A backbone with a fresh linear head.

    Args:
        name: ``small_conv``, ``small_vit``; ``resnet18``, ``resnet50``, ``densenet121`` or ``mobilenet_v2`` of torchvision;
            ``timm:<model>`` for any classifier of timm; ``gmoe_vit_s16`` or ``gmoe_vit_b16``: what DeiT-S/16 and DeiT-B/16 become
            by ``sparse``.
        image_shape: ``(C, H, W)``. torchvision's pretrained weights are for three channels; timm's are fitted to others.
        num_outputs: K.
        weights: ``none`` (random), ``pretrained`` (the library's, downloaded), or the path of a safetensors or
            ``.pth`` file that holds the tensors of ``features`` under the names that :class:`Network` gives them. Of vision
            transformers also timm's and DeiT's files; of sparse ones, files of the dense network, of the sparse one, or of
            GMoE's public code.
        last_relu: DenseNet only, see :class:`PooledDenseNet`.
        sparse: of vision transformers: what becomes of their feed-forward parts.

    Raises:
        UserError: unknown name, weights that cannot be fetched, read or fitted.
    """
    pretrained = weights == "pretrained"
    name = BY_OTHER_NAMES.get(name, name)
    if name in ("small_conv", "small_vit"):
        if pretrained:
            raise UserError(f"backbone.weights: {name} has no pretrained weights: use none or a file")
        least, most = (1, SMALL) if name == "small_conv" else (2, SMALL_PATCHES)
        if not least <= min(image_shape[1:]) <= max(image_shape[1:]) <= most:
            raise UserError(
                f"backbone.name: {name} is for images of {least} to {most} pixels, these are {image_shape}: use another"
            )
        features = SmallConv(image_shape=image_shape) if name == "small_conv" else small_vit(image_shape=image_shape)
    elif name.startswith("timm:"):
        features = _timm_features(name.removeprefix("timm:"), image_shape, pretrained)
    elif name in _TORCHVISION:
        features = _torchvision_features(name, image_shape[0], pretrained, last_relu)
    else:
        known = ", ".join(["small_conv", "small_vit", *_TORCHVISION, "timm:<model>", *BY_OTHER_NAMES])
        raise UserError(f"backbone.name: {name!r} is unknown; use one of {known}")
    width = _feature_width(features, image_shape)
    tensors = None if weights in ("none", "pretrained") else load_tensors(Path(weights))[0]
    if tensors is not None and (name.startswith("timm:") or name == "small_vit"):
        tensors = as_features(tensors, own=features.state_dict(), where=weights)
    if tensors is not None and (sparse is None or not holds_sparse(tensors)):
        load_into(features, tensors, where=weights)
        tensors = None
    if sparse is not None:
        make_sparse(features, sparse, clustered=weights != "none" and tensors is None)
        if tensors is not None:
            load_into(features, tensors, where=weights)
    return Network(features=features, head=nn.Linear(width, num_outputs))


def in_layout(network: Network, layout: torch.memory_format) -> Network:
    """The network itself, its convolutions laid out in memory as asked for; its numbers change by rounding at most."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return network


def _resnet(net: Any, last_relu: bool) -> nn.Module:
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages, net.avgpool, nn.Flatten())


def _densenet(net: Any, last_relu: bool) -> nn.Module:
    return PooledDenseNet(net.features, last_relu=last_relu)


def _mobilenet(net: Any, last_relu: bool) -> nn.Module:
    return nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


_TORCHVISION: dict[str, tuple[str, Callable[[Any, bool], nn.Module]]] = {
    "resnet18": ("conv1", _resnet),
    "resnet50": ("conv1", _resnet),
    "densenet121": ("features.conv0", _densenet),
    "mobilenet_v2": ("features.0.0", _mobilenet),
}
"""The first convolution, and how the model's modules become features."""


def _torchvision_features(name: str, channels: int, pretrained: bool, last_relu: bool) -> nn.Module:
    if pretrained and channels != 3:
        raise UserError(f"backbone.weights: pretrained weights are for 3 channels, the images have {channels}: use none")
    try:
        net = torchvision().models.get_model(name, weights="DEFAULT" if pretrained else None)
    except OSError as error:  # urllib's errors, and a full or read-only cache
        raise _no_weights(name, error) from error
    first_name, as_features = _TORCHVISION[name]
    if channels != 3:
        first = net.get_submodule(first_name)
        fresh = nn.Conv2d(channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False)
        net.set_submodule(first_name, fresh)
    return as_features(net, last_relu)


def _timm_features(name: str, image_shape: tuple[int, int, int], pretrained: bool) -> nn.Module:
    torchvision()  # timm imports it
    import timm

    if name not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"backbone.name: timm has no model {name!r}; some it has: {near}")

    def create(**size: tuple[int, ...]) -> nn.Module:
        made: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=image_shape[0], **size)
        return made

    try:
        try:
            return create(img_size=image_shape[1:])
        except TypeError:  # convolutional networks take any size, and no such argument
            return create()
    except Exception as error:  # whatever a model of a thousand thinks of its arguments, or of its missing weights
        if pretrained:
            raise _no_weights(name, error) from error
        raise UserError(f"backbone.name: timm cannot build {name!r} for images of {image_shape}: {_first_line(error)}") from error


def _no_weights(name: str, error: Exception) -> UserError:
    return UserError(
        f"backbone.weights: the pretrained weights of {name} could not be fetched ({_first_line(error)}): "
        "connect to the network once, or set weights to a local file, or to none"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _feature_width(features: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """D; where the network lets itself be followed without numbers, whatever the size of the images, in no time and memory."""
    was_training = features.training
    shapes = {name: tensor.to("meta") for name, tensor in (*features.named_parameters(), *features.named_buffers())}
    try:
        with torch.no_grad():
            try:
                out = functional_call(features.eval(), shapes, (torch.zeros(1, *image_shape, device="meta"),))
            except (RuntimeError, ValueError, AssertionError, NotImplementedError):
                out = features.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"backbone.name: it cannot take images of {image_shape}: {_first_line(error)}") from error
    features.train(was_training)
    return int(out.shape[1])
