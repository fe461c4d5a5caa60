"""Backbones by name, each as features and head: experts and students are built here.

Notation: images ``[B, C, H, W]``, features ``[B, D]``, logits ``[B, K]``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.artifacts import load_into, load_tensors
from dmoe.errors import UserError
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


class SmallConv(nn.Sequential):
    """Four 3x3 convolutions with batch-norm for images of about 14x14; a linear layer sees where things are.

    No global pooling: what the student has to learn about a domain is where the top of an image is.
    """

    def __init__(self, *, image_shape: tuple[int, int, int], width: int = 64) -> None:
        layers: list[nn.Module] = []
        channels, height, breadth = image_shape
        for filters, stride in ((16, 1), (32, 2), (64, 2), (64, 1)):
            layers += [nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
            channels, height, breadth = filters, -(-height // stride), -(-breadth // stride)
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * height * breadth, width))


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
) -> Network:
    """A backbone with a fresh linear head.

    Args:
        name: ``small_conv``; ``resnet18``, ``resnet50``, ``densenet121`` or ``mobilenet_v2`` of torchvision; ``timm:<model>``
            for any classifier of timm.
        image_shape: ``(C, H, W)``. torchvision's pretrained weights are for three channels; timm's are fitted to others.
        num_outputs: K.
        weights: ``none`` (random), ``pretrained`` (the library's, downloaded), or the path of a safetensors or
            ``.pth`` file that holds the tensors of ``features`` under the names that :class:`Network` gives them.
        last_relu: DenseNet only, see :class:`PooledDenseNet`.

    Raises:
        UserError: unknown name, weights that cannot be fetched, read or fitted.
    """
    pretrained = weights == "pretrained"
    if name == "small_conv":
        if pretrained:
            raise UserError("backbone.weights: small_conv has no pretrained weights: use none or a file")
        if max(image_shape[1:]) > SMALL:
            raise UserError(
                f"backbone.name: small_conv is for images of up to {SMALL} pixels, these are {image_shape}: use another"
            )
        features: nn.Module = SmallConv(image_shape=image_shape)
    elif name.startswith("timm:"):
        features = _timm_features(name.removeprefix("timm:"), image_shape, pretrained)
    elif name in _TORCHVISION:
        features = _torchvision_features(name, image_shape[0], pretrained, last_relu)
    else:
        known = ", ".join(["small_conv", *_TORCHVISION, "timm:<model>"])
        raise UserError(f"backbone.name: {name!r} is unknown; use one of {known}")
    if weights not in ("none", "pretrained"):
        load_into(features, load_tensors(Path(weights))[0], where=weights)
    return Network(features=features, head=nn.Linear(_feature_width(features, image_shape), num_outputs))


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
