"""A norm inside a convolution: the same features and the same gradients, and which norms are left alone."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from dmoe.models.folding import Folding
from dmoe.models.networks import build_network


def settled(module: nn.Module) -> nn.Module:
    """In eval mode, with statistics and affine values as if it had been trained."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 1.5)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.2)
    return module.double().eval()


def plain(module: nn.Module, theta: Mapping[str, Tensor], images: Tensor) -> Tensor:
    found: Tensor = functional_call(module, (dict(theta), dict(module.named_buffers())), (images,))
    return found


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def convolutions(**choices: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=choices.get("bias", True)), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


BACKBONES = {"resnet18": 20, "resnet50": 53, "densenet121": 59, "mobilenet_v2": 52, "small_conv": 4, "timm:test_resnet": None}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folded_backbone_says_and_learns_the_same(name: str) -> None:
    features = settled(build_network(name, image_shape=(3, 64, 64), num_outputs=2).features)
    folding, theta = Folding(features), parameters(features)
    images, direction = torch.randn(2, 3, 64, 64, dtype=torch.float64), {n: torch.randn_like(v) for n, v in theta.items()}
    found, expected = folding.features(folding.prepare(theta), images), plain(features, theta, images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def folded_loss(p: Mapping[str, Tensor]) -> Tensor:
        return folding.features(folding.prepare(p), images).square().mean()

    def plain_loss(p: Mapping[str, Tensor]) -> Tensor:
        return plain(features, p, images).square().mean()

    first, second = (jvp(grad(loss), (theta,), (direction,)) for loss in (folded_loss, plain_loss))
    for ours, theirs in zip(first[:2], second[:2], strict=True):  # the gradient, and the Hessian times the direction
        ours_flat, theirs_flat = (torch.cat([t[n].flatten() for n in theta]) for t in (ours, theirs))
        assert (ours_flat - theirs_flat).norm() / theirs_flat.norm() < 1e-10


@pytest.mark.parametrize("name", [name for name, pairs in BACKBONES.items() if pairs])
def test_all_norms_behind_a_convolution_are_folded(name: str) -> None:
    assert Folding(build_network(name, image_shape=(3, 64, 64), num_outputs=2).features).pairs == BACKBONES[name]


def test_the_module_is_left_alone() -> None:
    module = settled(convolutions(bias=False))
    before = copy.deepcopy(module.state_dict())
    folding = Folding(module)
    folding.features(folding.prepare(parameters(module)), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert isinstance(module[1], nn.BatchNorm2d)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_statistics_that_change_in_place_show() -> None:
    module, images = settled(convolutions()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folding = Folding(module)
    module[1].running_mean.add_(1)
    torch.testing.assert_close(folding.features(folding.prepare(parameters(module)), images), module(images))


class Twice(nn.Module):
    """One convolution, called twice, with a norm behind the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.norm(self.convolution(self.convolution(images)))
        return found


class Branching(nn.Module):
    """What the convolution says goes into the norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        seen: Tensor = self.convolution(images)
        return seen + self.norm(seen)


class Untraceable(nn.Module):
    """It looks at the values of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.norm(self.convolution(images if images.sum() > 0 else -images))
        return found


def hooked() -> nn.Module:
    module = convolutions()
    module[0].register_forward_hook(lambda part, inputs, output: 2 * output)
    return module


def tied() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    module[2].weight = module[0].weight
    return module


OTHERS = {
    "a convolution called twice": Twice,
    "an output used twice": Branching,
    "values looked at": Untraceable,
    "a hook": hooked,
    "tied weights": tied,
    "no affine values": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "no running statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "no convolution": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_folded_stays_as_it_is(case: str) -> None:
    module = settled(OTHERS[case]())
    folding, images = Folding(module), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert folding.pairs == 0
    assert torch.equal(folding.features(folding.prepare(parameters(module)), images), module(images))
