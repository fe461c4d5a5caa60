"""ARM-CML: the context is the mean over the support, behind the channels of every image of its domain."""

import torch
from small_arms import TASK, episodes, network, refuse_gradient_that_differs
from torch import Tensor, nn

from dmoe.baselines.arm_cml import ArmCml, ContextNetwork


def arm() -> ArmCml:
    context = ContextNetwork(channels=1, context_channels=2, width=3, kernel_size=3).double()
    for _ in range(3):  # running statistics of its own
        context(torch.randn(8, 1, 6, 6, dtype=torch.float64) * 2 + 1)
    return ArmCml(network(channels=3), context, task=TASK).eval()


def test_adapted_student_sees_the_mean_context_behind_every_image() -> None:
    made, (support, query) = arm(), episodes()
    student = made.adapt(support[0])
    with torch.no_grad():
        context = torch.stack([made.context(image[None])[0] for image in support[0]]).mean(0)
        expected = [made.network(torch.cat([image, context])[None])[0] for image in query[0]]
    torch.testing.assert_close(student.logits(query[0]), torch.stack(expected))


def test_trained_on_is_what_the_adapted_student_says() -> None:
    made, (support, query) = arm(), episodes()
    expected = [made.adapt(images).logits(asked) for images, asked in zip(support, query, strict=True)]
    torch.testing.assert_close(made.query_logits(support, query), torch.cat(expected))


def test_gradient_goes_through_the_context() -> None:
    made = arm()
    refuse_gradient_that_differs(made, *episodes())


def test_context_is_of_the_size_of_the_image_for_any_kernel() -> None:
    for kernel_size in (1, 3, 5):
        context = ContextNetwork(channels=3, context_channels=7, width=4, kernel_size=kernel_size)
        assert context(torch.randn(2, 3, 9, 6)).shape == (2, 7, 9, 6)


def test_in_training_all_domains_are_normalised_together() -> None:
    made, (support, query) = arm(), episodes()
    made.train()
    seen: list[Tensor] = []
    assert isinstance(made.network.features, nn.Sequential)
    made.network.features[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    made.query_logits(support, query)
    assert [len(values) for values in seen] == [5]


def test_adapting_changes_nothing_and_does_not_depend_on_what_came_before() -> None:
    made, (support, query) = arm(), episodes()
    made.train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    first = made.adapt(support[0])
    other = made.adapt(support[1])
    again = made.adapt(support[0], start=other)
    assert made.training
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert torch.equal(first.logits(query[0]), again.logits(query[0]))
    assert not torch.equal(first.logits(query[0]), other.logits(query[0]))
