"""The aggregator: a function of a set, a standard transformer block, and an affine map that can be fitted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmoe.models.aggregator import Aggregator, Block, Pooling

B, N, D, K = 5, 4, 12, 3


def aggregator(*, output_map: bool = False, dropout: float = 0.1) -> Aggregator:
    made = Aggregator(width=D, num_outputs=K, depth=2, heads=3, dropout=dropout, output_map=output_map)
    return made.double().eval()


def tokens(count: int = N) -> Tensor:
    return torch.randn(B, count, D, dtype=torch.float64)


def test_the_target_does_not_depend_on_the_order_of_the_experts() -> None:
    model, x = aggregator(output_map=True), tokens()
    expected = model(x)
    for order in ([3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1]):
        torch.testing.assert_close(model(x[:, order]), expected, rtol=1e-12, atol=1e-13)


def test_every_expert_matters_to_the_target() -> None:
    model, x = aggregator(), tokens()
    for expert in range(N):
        changed = x.clone()
        changed[:, expert] += torch.randn(B, D)
        assert (model(changed) - model(x)).abs().amin(dim=1).max() > 1e-6


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, x = aggregator(), tokens()
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_tokens_gives_one_target_an_image(count: int) -> None:
    assert aggregator()(tokens(count)).shape == (B, D)


def test_a_block_is_the_standard_pre_norm_encoder_layer_twice_as_wide() -> None:
    block = Block(width=D, heads=3, dropout=0.1).double().eval()
    layer = nn.TransformerEncoderLayer(
        D, 3, dim_feedforward=2 * D, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    ).eval()
    layer.self_attn.load_state_dict(block.attention.state_dict())
    for ours, theirs in zip((0, 3), (layer.linear1, layer.linear2), strict=True):
        theirs.load_state_dict(block.perceptron[ours].state_dict())
    for norm, their_norm in ((block.attention_norm, layer.norm1), (block.perceptron_norm, layer.norm2)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        their_norm.load_state_dict(norm.state_dict())
    x = tokens()
    torch.testing.assert_close(block(x), layer(x), rtol=1e-10, atol=1e-12)


def test_the_pooled_feature_is_the_mean_of_the_transformed_tokens() -> None:
    model, x = aggregator(), tokens()
    transformed = model.blocks[1](model.blocks[0](x))
    torch.testing.assert_close(model.pooled(x), transformed.sum(dim=1) / N)


def test_without_an_output_map_the_target_is_the_pooled_feature() -> None:
    model, x = aggregator(), tokens()
    assert torch.equal(model(x), model.pooled(x))


def test_a_fresh_output_map_changes_nothing() -> None:
    model, x = aggregator(output_map=True), tokens()
    torch.testing.assert_close(model(x), model.pooled(x))


def test_the_output_map_is_fitted_exactly_where_an_affine_map_fits() -> None:
    model = aggregator(output_map=True)
    x = torch.randn(60, N, D, dtype=torch.float64)
    matrix, offset = torch.randn(D, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    pooled = model.pooled(x).detach()
    model.fit_output_map(pooled, pooled @ matrix + offset)
    fresh = tokens()
    torch.testing.assert_close(model(fresh), model.pooled(fresh) @ matrix + offset, rtol=1e-9, atol=1e-10)


def test_the_fitted_map_is_the_least_squares_one_where_none_fits() -> None:
    model = aggregator(output_map=True)
    x, features = torch.randn(60, N, D, dtype=torch.float64), torch.randn(60, D, dtype=torch.float64)
    pooled = model.pooled(x).detach()
    model.fit_output_map(pooled, features)
    residual = (model(x) - features).detach()
    torch.testing.assert_close(residual.mean(dim=0), torch.zeros_like(residual[0]))
    torch.testing.assert_close(pooled.T @ residual, torch.zeros(D, D, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_output_map_can_be_fitted_to_fewer_images_than_features() -> None:
    model = aggregator(output_map=True)
    x, features = tokens(), torch.randn(B, D, dtype=torch.float64)
    model.fit_output_map(model.pooled(x), features)
    torch.testing.assert_close(model(x), features)


def test_the_output_map_can_be_fitted_to_features_that_depend_on_each_other() -> None:
    model = aggregator(output_map=True)
    pooled = torch.randn(60, 3, dtype=torch.float64) @ torch.randn(3, D, dtype=torch.float64)
    pooled[:, 0] = 0
    features = pooled @ torch.randn(D, D, dtype=torch.float64)
    model.fit_output_map(pooled, features)
    assert model.output_map is not None
    torch.testing.assert_close(model.output_map(pooled), features)


def test_fitting_without_an_output_map_is_refused() -> None:
    with pytest.raises(ValueError, match="no output map"):
        aggregator().fit_output_map(torch.zeros(3, D), torch.zeros(3, D))


def test_logits_are_not_changed_by_the_output_map() -> None:
    model, x = aggregator(output_map=True), tokens()
    before = model.logits(x)
    model.fit_output_map(model.pooled(x), torch.randn(B, D))
    assert torch.equal(model.logits(x), before)
    assert before.shape == (B, K)


def test_dropout_is_on_in_training_mode_only() -> None:
    model, x = aggregator(dropout=0.5), tokens()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_the_target_can_be_differentiated_twice() -> None:
    model, x = aggregator(), tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.abs().max() > 0


def test_attention_is_the_softmax_of_scaled_products_of_queries_and_keys_in_every_block() -> None:
    model, x = aggregator(output_map=True), tokens()
    found = model.attention(x)
    assert found.shape == (2, B, 3, N, N)
    for block, weights in zip(model.blocks, found, strict=True):
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        projected = normed @ block.attention.in_proj_weight.T + block.attention.in_proj_bias
        query, key = (part.unflatten(-1, (3, D // 3)).transpose(1, 2) for part in projected.split(D, dim=-1)[:2])
        torch.testing.assert_close(weights, (query @ key.mT / (D // 3) ** 0.5).softmax(-1), rtol=1e-10, atol=1e-12)
        x = block(x)


@pytest.mark.parametrize(("pooling", "pool"), [("mean", np.mean), ("max", np.max)])
def test_pooling_without_a_transformer_is_of_the_tokens_as_they_are(
    pooling: Pooling, pool: Callable[..., NDArray[np.float64]]
) -> None:
    model, x = Aggregator(width=D, num_outputs=K, depth=2, heads=5, dropout=0.1, pooling=pooling).double(), tokens()
    np.testing.assert_allclose(model(x).numpy(), pool(x.numpy(), axis=1), rtol=1e-14)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"head"}, "nothing to learn but the head"
    torch.testing.assert_close(model.logits(x), model.head(model(x)))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_behind_any_pooling_an_output_map_can_be_fitted(pooling: Pooling) -> None:
    model = Aggregator(width=D, num_outputs=K, depth=1, heads=3, dropout=0.1, output_map=True, pooling=pooling).double()
    x, matrix = torch.randn(60, N, D, dtype=torch.float64), torch.randn(D, D, dtype=torch.float64)
    model.fit_output_map(model.pooled(x), model.pooled(x) @ matrix + 2)
    torch.testing.assert_close(model(x), model.pooled(x) @ matrix + 2)
