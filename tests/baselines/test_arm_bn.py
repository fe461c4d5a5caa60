"""ARM-BN: adapting is batch statistics, and training goes through just that."""

import pytest
import torch
from small_arms import TASK, episodes, network, refuse_gradient_that_differs
from torch import nn

from dmoe.baselines.arm_bn import ArmBn
from dmoe.baselines.batch_statistics import BatchStatistics
from dmoe.errors import UserError
from dmoe.models.networks import Network
from dmoe.models.student import Student


def test_adapting_is_batch_statistics() -> None:
    made, (support, query) = ArmBn(network(), task=TASK), episodes()
    student = Student(features=made.network.features, head=made.network.head, task=TASK)
    expected = BatchStatistics(student).adapt(support[0])
    assert torch.equal(made.adapt(support[0]).logits(query[0]), expected.logits(query[0]))
    assert not torch.allclose(student.logits(query[0]), expected.logits(query[0]))


def test_trained_on_is_what_the_adapted_student_says() -> None:
    made, (support, query) = ArmBn(network(), task=TASK), episodes()
    expected = [made.adapt(images).logits(asked) for images, asked in zip(support, query, strict=True)]
    torch.testing.assert_close(made.query_logits(support, query), torch.cat(expected))


def test_norm_without_scale_and_shift_is_taken_too() -> None:
    whole, (support, query) = network(), episodes()
    whole.features[1] = nn.BatchNorm2d(3, affine=False).double()  # type: ignore[operator]
    made = ArmBn(whole, task=TASK)
    torch.testing.assert_close(made.query_logits(support, query)[:3], made.adapt(support[0]).logits(query[0]))


def test_gradient_goes_through_the_statistics_of_the_support() -> None:
    whole = network()
    assert isinstance(whole.features, nn.Sequential)
    for layer in (0, 4):  # statistics take a bias away again
        whole.features[layer].bias = None
    refuse_gradient_that_differs(ArmBn(whole, task=TASK), *episodes())


def test_its_parameters_and_state_are_those_of_the_network() -> None:
    made = ArmBn(network(), task=TASK)
    assert made.state_dict().keys() == {f"network.{name}" for name in made.network.state_dict()}
    assert len(list(made.parameters())) == len(list(made.network.parameters()))


def test_nothing_is_kept_of_an_episode_and_running_statistics_stay() -> None:
    made, (support, query) = ArmBn(network(), task=TASK), episodes()
    made.train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    one, other = made.query_logits(support, query), made.query_logits(support, query)
    student = made.adapt(support[1])
    assert torch.equal(one, other)
    assert torch.equal(made.adapt(support[0], start=student).logits(query[0]), made.adapt(support[0]).logits(query[0]))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_network_without_batch_norm_is_refused() -> None:
    plain = Network(features=nn.Flatten(), head=nn.Linear(36, 3))
    with pytest.raises(UserError, match=r"^ARM-BN: the network has no batch-norm layer"):
        ArmBn(plain, task=TASK)
