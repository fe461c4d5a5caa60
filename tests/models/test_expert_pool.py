"""The frozen experts side by side, the mask, and the two ways to normalise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.models.expert_pool import BatchNormStatistics, ExpertPool, Mask, without_own_expert
from dmoe.models.networks import build_network

TOKENS = torch.arange(2 * 3 * 2, dtype=torch.float32).view(2, 3, 2) + 1
OWN = torch.tensor([0, 1])


def expert() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(count: int = 6) -> Tensor:
    return 2 * torch.randn(count, 2, 8, 8) + 1


def test_remove_leaves_the_other_tokens_in_their_order() -> None:
    expected = torch.stack([TOKENS[0, [1, 2]], TOKENS[1, [0, 2]]])
    assert torch.equal(without_own_expert(TOKENS, OWN), expected)


def test_zero_silences_the_own_token_and_keeps_the_others() -> None:
    expected = TOKENS.clone()
    expected[0, 0] = expected[1, 1] = 0
    assert torch.equal(without_own_expert(TOKENS, OWN, mask="zero"), expected)


def test_none_keeps_every_token() -> None:
    assert torch.equal(without_own_expert(TOKENS, OWN, mask="none"), TOKENS)


@pytest.mark.parametrize("mask", ["remove", "zero", "none"])
def test_a_mask_leaves_the_tokens_it_was_given_alone(mask: Mask) -> None:
    tokens = TOKENS.clone()
    without_own_expert(tokens, OWN, mask=mask)
    assert torch.equal(tokens, TOKENS)


def test_tokens_are_the_features_of_each_expert_in_eval_mode() -> None:
    experts, x = [expert() for _ in range(3)], images()
    tokens = ExpertPool(experts)(x)
    assert tokens.shape == (6, 3, 4)
    for number, one in enumerate(experts):
        assert torch.equal(tokens[:, number], one.eval()(x))


def test_tokens_carry_no_gradient() -> None:
    assert not ExpertPool([expert()])(images().requires_grad_()).requires_grad


def test_batch_statistics_are_those_of_the_batch_at_hand() -> None:
    one, x = expert(), images()
    convolution, norm = one[0], one[1]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    normalised = F.batch_norm(convolution(x), None, None, norm.weight, norm.bias, training=True)
    expected = normalised.relu().mean(dim=(2, 3))
    torch.testing.assert_close(ExpertPool([one], batch_norm="batch")(x)[:, 0], expected)


@pytest.mark.parametrize("name", ["resnet18", "timm:test_efficientnet"])
def test_batch_statistics_are_those_of_training_mode_in_a_whole_backbone(name: str) -> None:
    features = build_network(name, image_shape=(3, 64, 64), num_outputs=2).features
    x = torch.randn(4, 3, 64, 64)
    tokens = ExpertPool([features], batch_norm="batch")(x)
    torch.testing.assert_close(tokens[:, 0], copy.deepcopy(features).train()(x))


def test_batch_statistics_are_forgotten_from_batch_to_batch() -> None:
    pool, x = ExpertPool([expert()], batch_norm="batch"), images()
    before = pool(x)
    pool(5 * images() - 3)
    assert torch.equal(pool(x), before)


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_the_modules_handed_in_stay_as_they_are(batch_norm: BatchNormStatistics, training: bool) -> None:
    one = expert().train(training)
    before = copy.deepcopy(one.state_dict())
    ExpertPool([one], batch_norm=batch_norm)(images())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(module.training == training for module in one.modules())
    assert isinstance(one[1], nn.BatchNorm2d)
    assert one[1].track_running_stats


def test_the_pool_shares_the_weights_of_its_experts() -> None:
    one = expert()
    pool = ExpertPool([one])
    assert {id(p) for p in pool.parameters()} == {id(p) for p in one.parameters()}


def test_length_is_the_number_of_experts() -> None:
    assert len(ExpertPool(expert() for _ in range(3))) == 3


def test_bfloat16_experts_say_nearly_the_same_in_float32() -> None:
    experts, x = [expert().eval() for _ in range(2)], images()
    exact, coarse = ExpertPool(experts)(x), ExpertPool(experts, precision="bfloat16")(x)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    torch.testing.assert_close(coarse, exact, rtol=0.05, atol=0.05)
