"""Backbones by name: they build, they are the library's networks, and mistakes are told in one line."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmoe.artifacts import save_tensors
from dmoe.errors import UserError
from dmoe.models.networks import Network, build_network
from dmoe.models.torchvision_import import torchvision

WIDTHS = {
    "small_conv": 64,
    "resnet18": 512,
    "resnet50": 2048,
    "densenet121": 1024,
    "mobilenet_v2": 1280,
    "timm:resnet10t": 512,
    "timm:test_vit": 64,
}
SHAPE = (3, 32, 32)


def build(name: str, *, channels: int = 3, weights: str = "none", last_relu: bool = True) -> Network:
    return build_network(name, image_shape=(channels, *SHAPE[1:]), num_outputs=5, weights=weights, last_relu=last_relu).eval()


def whole_network(name: str) -> nn.Module:
    """torchvision's, with batch-norm statistics that are not the initial ones."""
    net: nn.Module = torchvision().models.get_model(name, weights=None, num_classes=5)
    net.train()(torch.randn(4, *SHAPE) + 0.5)
    return net.eval()


def load_in_order(network: Network, whole: nn.Module) -> None:
    """Entry k of ours is entry k of torchvision's; the last two are the head's."""
    tensors: list[Tensor] = list(whole.state_dict().values())
    network.features.load_state_dict(dict(zip(network.features.state_dict(), tensors[:-2], strict=True)))
    network.head.load_state_dict({"weight": tensors[-2], "bias": tensors[-1]})


@pytest.mark.parametrize("name", WIDTHS)
def test_every_backbone_gives_features_of_its_width_and_logits(name: str) -> None:
    network, x = build(name), torch.randn(2, *SHAPE)
    assert network.width == WIDTHS[name]
    assert network.features(x).shape == (2, WIDTHS[name])
    assert network(x).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
@torch.no_grad()
def test_features_and_head_together_are_the_torchvision_network(name: str) -> None:
    network, whole, x = build(name), whole_network(name), torch.randn(3, *SHAPE)
    load_in_order(network, whole)
    torch.testing.assert_close(network(x), whole(x))


@torch.no_grad()
def test_densenet_without_its_last_relu_pools_the_norm_itself() -> None:
    network, whole, x = build("densenet121", last_relu=False), whole_network("densenet121"), torch.randn(3, *SHAPE)
    load_in_order(network, whole)
    torch.testing.assert_close(network.features(x), whole.features(x).mean(dim=(2, 3)))
    assert (network(x) - whole(x)).abs().max() > 1e-3


def test_densenet_has_the_same_tensors_with_and_without_its_last_relu() -> None:
    assert list(build("densenet121").state_dict()) == list(build("densenet121", last_relu=False).state_dict())


@pytest.mark.parametrize("name", ["small_conv", "resnet18", "densenet121", "mobilenet_v2", "timm:resnet10t", "timm:test_vit"])
def test_images_may_have_other_than_three_channels(name: str) -> None:
    assert build(name, channels=8)(torch.randn(2, 8, *SHAPE[1:])).shape == (2, 5)


@pytest.mark.parametrize("name", ["small_conv", "resnet18", "timm:resnet10t"])
def test_weights_of_a_file_are_taken_over_and_the_head_is_fresh(tmp_path: Path, name: str) -> None:
    saved, path = build(name), tmp_path / "features.safetensors"
    save_tensors(path, saved.features.state_dict())
    loaded, x = build(name, weights=str(path)), torch.randn(2, *SHAPE)
    assert torch.equal(loaded.features(x), saved.features(x))
    assert not torch.equal(loaded.head.weight, saved.head.weight)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    save_tensors(path, build("small_conv").features.state_dict())
    with pytest.raises(UserError, match=r"features\.safetensors"):
        build("resnet18", weights=str(path))


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        build("resnet18", weights=str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize("name", ["resnet19", "timm:no_such_model", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"backbone\.name"):
        build(name)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_pretrained_weights_for_eight_channels_are_refused_before_anything_is_downloaded(name: str) -> None:
    with pytest.raises(UserError, match="for 3 channels, the images have 8"):
        build(name, channels=8, weights="pretrained")


def test_pretrained_weights_of_the_small_network_are_refused() -> None:
    with pytest.raises(UserError, match="small_conv has no pretrained weights"):
        build("small_conv", weights="pretrained")


def test_images_too_small_for_the_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(3, 14, 14\)"):
        build_network("densenet121", image_shape=(3, 14, 14), num_outputs=5)


def test_a_vit_is_built_for_the_size_of_the_images() -> None:
    network = build_network("timm:test_vit", image_shape=(3, 48, 64), num_outputs=5)
    assert network(torch.randn(2, 3, 48, 64)).shape == (2, 5)


def test_building_leaves_batch_norm_statistics_at_their_start() -> None:
    for name, buffer in build("resnet18").named_buffers():
        assert torch.equal(buffer, torch.ones_like(buffer) if name.endswith("running_var") else torch.zeros_like(buffer)), name


def test_a_fresh_network_is_in_training_mode() -> None:
    network = build_network("resnet18", image_shape=SHAPE, num_outputs=5)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["timm:deit_tiny_patch16_224", "timm:efficientvit_b0"])
def test_timm_networks_with_and_without_a_fixed_size_are_built(name: str) -> None:
    network = build_network(name, image_shape=(3, 64, 64), num_outputs=5)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_plain_tensors_in_a_pth_file_are_loaded(tmp_path: Path) -> None:
    theirs = build("resnet18")
    torch.save(theirs.features.state_dict(), tmp_path / "weights.pth")
    ours = build("resnet18", weights=str(tmp_path / "weights.pth"))
    assert all(torch.equal(a, b) for a, b in zip(theirs.features.parameters(), ours.features.parameters(), strict=True))


class Nasty:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_code_in_a_pth_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"0.weight": Nasty()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="plain tensors"):
        build("resnet18", weights=str(tmp_path / "weights.pth"))
