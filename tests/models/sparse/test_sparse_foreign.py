"""Files of others: DeiT's dense networks, and GMoE's by the names of Tutel."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse_settings import EMOE, GMOE, changed
from torch import Tensor

from dmoe.errors import UserError
from dmoe.models.networks import build_network
from dmoe.models.sparse import SparseSettings, sparse_layers

SHAPE = (1, 14, 14)


def network(weights: str = "none", *, sparse: SparseSettings | None = None, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_network("small_vit", image_shape=SHAPE, num_outputs=3, weights=weights, sparse=sparse).features.eval()


def tutel(tensors: dict[str, Tensor], router: str) -> dict[str, Tensor]:
    """The sparse tensors under Tutel's names."""
    names = {"b1": "experts.batched_fc1_bias", "w2": "experts.batched_fc2_w", "b2": "experts.batched_fc2_bias"}
    names |= {"router.projection.weight": "gates.0.cosine_projector.weight", "router.log_scale": "gates.0.temperature"}
    names |= {"router.projection.bias": "gates.0.cosine_projector.bias", "router.codes": "gates.0.sim_matrix"}
    names |= {"router.weight": "gates.0.wg.weight"}
    found = {}
    for name, tensor in tensors.items():
        place, is_layer, inner = name.partition(".mlp.")
        if not is_layer or inner.startswith("fc"):
            found[name] = tensor
        elif inner == "w1":
            found[f"{place}.mlp.experts.batched_fc1_w"] = tensor.mT.contiguous()
        else:
            found[f"{place}.mlp.{names[inner]}"] = tensor
        if inner == "w1":
            found[f"{place}.mlp._num_global_experts"] = torch.tensor(6)
    assert router != "linear" or any("wg" in name for name in found)
    return found


def test_a_dense_file_with_a_classifier_makes_every_expert(tmp_path: Path) -> None:
    dense = network(seed=1)
    tensors = {**dense.state_dict(), "head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    torch.save({"model": tensors}, tmp_path / "deit.pth")
    save_file({f"backbone.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "deit.safetensors")
    for name in ("deit.pth", "deit.safetensors"):
        alone = network(str(tmp_path / name), seed=2)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in alone.state_dict().items())
        layer = sparse_layers(network(str(tmp_path / name), sparse=GMOE, seed=2))["blocks.0.mlp"]
        assert all(torch.equal(layer.w1[e], dense.blocks[0].mlp.fc1.weight.T) for e in range(6))
        assert all(torch.equal(layer.b2[e], dense.blocks[0].mlp.fc2.bias) for e in range(6))


@pytest.mark.parametrize("router", ["cosine", "linear"])
def test_gmoes_files_are_read_by_tutels_names(tmp_path: Path, router: str) -> None:
    settings = changed(GMOE, router=router)
    whole = network(sparse=settings, seed=3)
    for parameter in whole.parameters():
        parameter.data += torch.randn_like(parameter)
    save_file({f"network.{n}": t.contiguous() for n, t in tutel(whole.state_dict(), router).items()}, tmp_path / "gmoe.safetensors")
    read = network(str(tmp_path / "gmoe.safetensors"), sparse=settings, seed=4)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in read.state_dict().items())
    x = torch.randn(2, *SHAPE)
    assert torch.equal(read(x), whole(x))


def test_an_experts_weights_in_tutels_layout_are_those_of_its_linear_layers(tmp_path: Path) -> None:
    """Tutel keeps both as [E, hidden, width]: the first as a linear layer has it, the second transposed."""
    dense = [torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)]
    tensors = tutel(network(sparse=GMOE).state_dict(), "cosine")
    tensors["blocks.0.mlp.experts.batched_fc1_w"][4] = dense[0].weight.data
    tensors["blocks.0.mlp.experts.batched_fc1_bias"][4] = dense[0].bias.data
    tensors["blocks.0.mlp.experts.batched_fc2_w"][4] = dense[1].weight.data.T
    tensors["blocks.0.mlp.experts.batched_fc2_bias"][4] = dense[1].bias.data
    save_file(tensors, tmp_path / "gmoe.safetensors")
    layer = sparse_layers(network(str(tmp_path / "gmoe.safetensors"), sparse=GMOE))["blocks.0.mlp"]
    x = torch.randn(5, 64)
    said = layer.act(x @ layer.w1[4] + layer.b1[4]) @ layer.w2[4] + layer.b2[4]
    torch.testing.assert_close(said, dense[1](torch.nn.functional.gelu(dense[0](x))))


def test_a_sparse_networks_own_file_is_read_with_its_units(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_file(network(seed=5).state_dict(), tmp_path / "dense.safetensors")
    whole = network(str(tmp_path / "dense.safetensors"), sparse=EMOE)
    assert not torch.equal(whole.blocks[0].mlp.units.flatten(), torch.arange(256))
    save_file(whole.state_dict(), tmp_path / "sparse.safetensors")
    read = network(str(tmp_path / "sparse.safetensors"), sparse=EMOE, seed=6)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in read.state_dict().items())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: {"blocks.0.mlp.experts.batched_fc1_w": torch.zeros(6, 128, 64)}, r"mlp\.w1 is \[6, 64, 128\]"),
        (lambda tensors: {"blocks.0.mlp.experts.batched_fc1_w": torch.zeros(64)}, r"batched_fc1_w is \[64\]"),
        (lambda tensors: {"blocks.0.mlp.experts.batched_fc3_w": torch.zeros(6, 64, 64)}, "batched_fc3_w is no tensor"),
        (lambda tensors: {"blocks.0.norm1.weight": torch.zeros(32)}, r"norm1\.weight is \[32\], the network's is \[64\]"),
    ],
    ids=["hidden", "flat", "unknown", "width"],
)
def test_a_file_of_another_width_is_one_line(tmp_path: Path, change, word: str) -> None:
    tensors = tutel(network(sparse=GMOE).state_dict(), "cosine")
    save_file({**tensors, **change(tensors)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=word) as caught:
        network(str(tmp_path / "other.safetensors"), sparse=GMOE)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_file_with_another_router_or_number_of_experts_is_one_line(tmp_path: Path) -> None:
    save_file(tutel(network(sparse=GMOE).state_dict(), "cosine"), tmp_path / "gmoe.safetensors")
    for settings in (changed(GMOE, router="linear"), changed(GMOE, experts=4), changed(GMOE, blocks=(1,)), EMOE):
        with pytest.raises(UserError, match=r"gmoe\.safetensors: "):
            network(str(tmp_path / "gmoe.safetensors"), sparse=settings)
    with pytest.raises(UserError, match="made for another network"):
        network(str(tmp_path / "gmoe.safetensors"))
