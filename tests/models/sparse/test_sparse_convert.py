"""Networks whose feed-forward parts became sparse, and back."""

import copy

import pytest
import torch
from sparse_settings import EMOE, GMOE, changed, four_blocks
from torch import Tensor, nn

from dmoe.errors import UserError
from dmoe.models.networks import build_network
from dmoe.models.sparse import SparseSettings, SplitFFN, make_dense, make_sparse, routings, sparse_layers
from dmoe.models.sparse.ffn import blocks_of, clustered_units

SHAPE = (1, 14, 14)


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = four_blocks(SHAPE)
    for parameter in made.parameters():  # biases begin at 0, norms at 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def encoder(activation: str = "gelu", *, norm_first: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation=activation, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()


def images(dtype: torch.dtype) -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_an_emoe_whose_experts_all_work_is_the_dense_network(dtype: torch.dtype, bound: float) -> None:
    dense, x = vit().to(dtype), images(dtype)
    sparse = make_sparse(copy.deepcopy(dense), changed(EMOE, top_k=8, blocks=(0, 1, 2, 3)))
    assert len(sparse_layers(sparse)) == 4
    assert (sparse(x) - dense(x)).abs().max() <= bound * dense(x).abs().max()


@pytest.mark.parametrize("blocks", ["last_two", "every_two", (1,)])
def test_an_emoe_has_the_dense_networks_parameters_and_goes_back_to_them_bit_for_bit(blocks: str | tuple[int, ...]) -> None:
    dense, x = vit(), images(torch.float32)
    before, said = {name: tensor.clone() for name, tensor in dense.state_dict().items()}, dense(x)
    count = sum(parameter.numel() for parameter in dense.parameters())
    sparse = make_sparse(copy.deepcopy(dense), changed(EMOE, blocks=blocks))
    assert sum(parameter.numel() for parameter in sparse.parameters()) == count
    assert not torch.equal(sparse(x), said)
    back = make_dense(sparse)
    assert not sparse_layers(back)
    assert {name: tensor.shape for name, tensor in back.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(back(x), said)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_torchs_encoder_becomes_an_emoe_and_itself_again(activation: str, norm_first: bool) -> None:
    dense = encoder(activation, norm_first=norm_first)
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for settings in (changed(EMOE, top_k=8, blocks=(0, 2)), EMOE):
        sparse = make_sparse(copy.deepcopy(dense), settings)
        with torch.no_grad():
            if settings.top_k == 8:
                torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)
                masked = (each(x, src_key_padding_mask=padding)[~padding] for each in (sparse, dense))
                torch.testing.assert_close(*masked, rtol=1e-5, atol=1e-6)
            else:
                assert not torch.allclose(sparse(x), dense(x), rtol=1e-3)
            back = make_dense(sparse)
            torch.testing.assert_close(back(x), dense(x), rtol=1e-6, atol=1e-6)
        assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_every_expert_of_a_gmoe_begins_as_the_dense_part_so_that_a_layer_says_the_dense_ones_words_times_the_gate() -> None:
    dense, x = vit(), torch.randn(9, 64)
    part = copy.deepcopy(dense.blocks[2].mlp)
    layer = make_sparse(dense, GMOE).blocks[2].mlp
    with routings(layer) as found:
        said = layer(x)
    gates = found[""].gates
    assert gates.max() < 1
    torch.testing.assert_close(said, gates * part(x), rtol=1e-5, atol=1e-6)
    layer.top_k = 3  # gates then have sum 1
    torch.testing.assert_close(layer(x), part(x), rtol=1e-5, atol=1e-6)


def test_hidden_units_of_an_expert_are_alike() -> None:
    first = nn.Linear(6, 12)
    kinds = torch.arange(12) % 3
    with torch.no_grad():
        first.weight.copy_(torch.eye(6)[kinds] * (1 + torch.rand(12, 1)) + 0.01 * torch.randn(12, 6))
    units = clustered_units(first, 3)
    assert sorted(units.flatten().tolist()) == list(range(12))
    assert all(len(kinds[each].unique()) == 1 for each in units)


def test_the_average_router_follows_the_weights() -> None:
    layer = make_sparse(vit(), EMOE).blocks[0].mlp
    x = torch.randn(7, 64)
    with routings(layer) as found:
        layer(x)
    torch.testing.assert_close(found[""].logits, torch.stack([x @ layer.w1[e].mean(dim=1) for e in range(8)], dim=1))
    assert torch.equal(found[""].gates, torch.ones(7, 3))
    with torch.no_grad():
        layer.w1[5] = 100 * x[0][:, None]
    with routings(layer) as found:
        layer(x)
    assert found[""].experts[0, 0] == 5


@pytest.mark.parametrize(
    ("where", "depth", "expected"),
    [
        ("last_two", 12, [8, 10]),
        ("every_two", 12, [0, 2, 4, 6, 8, 10]),
        ("last_two", 4, [0, 2]),
        ("every_two", 5, [1, 3]),
        ([3, 1, 3], 4, [1, 3]),
    ],
)
def test_blocks_by_words_and_numbers(where: str | list[int], depth: int, expected: list[int]) -> None:
    assert blocks_of(where, depth) == expected


def test_networks_by_name_have_the_published_sizes() -> None:
    network = build_network("gmoe_vit_s16", image_shape=(3, 32, 32), num_outputs=5, sparse=GMOE)
    layers = sparse_layers(network.features)
    assert list(layers) == ["blocks.8.mlp", "blocks.10.mlp"]
    assert [list(layer.w1.shape) for layer in layers.values()] == [[6, 384, 1536]] * 2
    assert network.width == 384
    dense = build_network("timm:deit_small_patch16_224", image_shape=(3, 32, 32), num_outputs=5)
    one = sum(p.numel() for p in dense.features.blocks[8].mlp.parameters())
    router = 384 * 256 + 256 + 256 * 6 + 1
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in dense.parameters()) + 2 * (5 * one + router)


def test_drop_path_rises_to_the_last_block_and_is_of_whole_images_in_training() -> None:
    network = make_sparse(vit(), changed(GMOE, drop_path=0.6))
    assert [block.drop_path1.rate for block in network.blocks] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    dropping = network.blocks[3].drop_path1
    x = torch.ones(4000, 3, 2)
    assert torch.equal(dropping.eval()(x), x)
    said = dropping.train()(x)
    assert torch.equal(said.amax(dim=(1, 2)), said.amin(dim=(1, 2)))
    assert said.mean().item() == pytest.approx(1, abs=0.08)
    assert (said == 0).float().mean().item() == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (changed(EMOE, experts=7), r"^backbone\.sparse\.experts: 7 experts do not divide the hidden width 256"),
        (changed(EMOE, top_k=9), r"^backbone\.sparse\.top_k: must be <= sparse\.experts, 8, got 9"),
        (changed(GMOE, blocks=(1, 4)), r"^backbone\.sparse\.blocks: there is no block 4, blocks are 0 to 1"),
    ],
    ids=["hidden", "top_k", "block"],
)
def test_what_does_not_fit_is_one_line(settings: SparseSettings, word: str) -> None:
    with pytest.raises(UserError, match=word):
        build_network("small_vit", image_shape=SHAPE, num_outputs=3, sparse=settings)


@pytest.mark.parametrize("name", ["small_conv", "resnet18", "timm:resnet18", "timm:convnext_atto"])
def test_a_network_that_is_no_transformer_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^backbone\.sparse: \w+ has no transformer blocks: choose a vision transformer"):
        build_network(name, image_shape=(3, 32, 32), num_outputs=3, sparse=GMOE)


def test_a_gmoe_has_no_way_back_and_a_sparse_network_is_not_made_sparse_again() -> None:
    network = make_sparse(vit(), GMOE)
    with pytest.raises(UserError, match="only emoe can be made dense"):
        make_dense(network)
    with pytest.raises(UserError, match="sparse already"):
        make_sparse(network, EMOE)
    assert not any(isinstance(layer, SplitFFN) for layer in sparse_layers(network).values())
