"""Private copies share tensors, and nothing else."""

import torch
from torch import nn

from dmoe.models.copying import private_copy, set_parameters


def module() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))


def test_the_copy_holds_the_very_same_tensors() -> None:
    original = module()
    copied = private_copy(original)
    for (name, one), (_, other) in zip(original.named_parameters(), copied.named_parameters(), strict=True):
        assert one is other, name
    for (name, one), (_, other) in zip(original.named_buffers(), copied.named_buffers(), strict=True):
        assert one is other, name


def test_the_copy_is_in_eval_mode_and_the_original_stays_in_its_own() -> None:
    original = module().train()
    copied = private_copy(original)
    assert not any(part.training for part in copied.modules())
    assert all(part.training for part in original.modules())


def test_changing_the_structure_of_the_copy_does_not_show_in_the_original() -> None:
    original = module()
    copied = private_copy(original)
    copied.register_module("0", nn.Identity())
    copied.get_submodule("1").register_parameter("weight", nn.Parameter(torch.zeros(2)))
    copied.get_submodule("2").p = 0.9
    assert isinstance(original[0], nn.Conv2d)
    assert torch.equal(original[1].weight, torch.ones(2))
    assert original[2].p == 0.5


def test_a_change_in_place_of_the_original_shows_in_the_copy() -> None:
    original = module()
    copied = private_copy(original)
    with torch.no_grad():
        original[0].bias.fill_(7)
    assert torch.equal(copied.get_parameter("0.bias"), torch.full((2,), 7.0))


def test_given_parameters_take_the_place_of_the_originals_in_the_copy_only() -> None:
    original = module()
    before = original[0].weight
    weight = torch.randn_like(before)
    copied = private_copy(original)
    set_parameters(copied, {"0.weight": weight})
    assert torch.equal(copied.get_parameter("0.weight"), weight)
    assert not copied.get_parameter("0.weight").requires_grad
    assert copied.get_parameter("0.bias") is original[0].bias
    assert original[0].weight is before


def test_tied_parameters_stay_tied_and_are_replaced_together() -> None:
    original = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    original[1].weight = original[0].weight
    copied = private_copy(original)
    set_parameters(copied, {"0.weight": torch.eye(3)})
    assert copied.get_parameter("1.weight") is copied.get_parameter("0.weight")
    assert torch.equal(copied.get_parameter("1.weight"), torch.eye(3))
