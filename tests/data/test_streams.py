"""What a step trains on is a pure function of the step."""

import pytest
import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.data.streams import EpochOrder, SupervisedBatches, stream


class Numbers(DomainSplit):
    """Images that say their own number and the draw they were asked with."""

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count) * 10
        self.domains = self.group_domains = torch.zeros(count, dtype=torch.int64)
        self.domain_names = {0: "all"}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return torch.stack([index.double(), torch.full((len(index),), float(draw or 0), dtype=torch.float64)], dim=1)


def _numbered(step: int) -> Tensor:
    return torch.full((3,), step)


def test_epoch_takes_every_thing_once() -> None:
    order = EpochOrder(20, 4, 1)
    assert order.steps_per_epoch == 5
    assert sorted(torch.cat([order[step] for step in range(5)]).tolist()) == list(range(20))


def test_last_smaller_batch_is_dropped() -> None:
    order = EpochOrder(22, 4, 1)
    assert order.steps_per_epoch == 5
    seen = torch.cat([order[step] for step in range(5)]).tolist()
    assert len(set(seen)) == len(seen) == 20


def test_what_is_dropped_changes_from_epoch_to_epoch() -> None:
    order = EpochOrder(22, 4, 1)
    seen = {number for step in range(50) for number in order[step].tolist()}
    assert seen == set(range(22))


def test_every_epoch_has_its_own_order() -> None:
    order = EpochOrder(20, 20, 1)
    assert not torch.equal(order[0], order[1])


def test_batch_larger_than_the_whole_is_the_whole() -> None:
    order = EpochOrder(5, 64, 1)
    assert (order.batch_size, order.steps_per_epoch) == (5, 1)
    assert sorted(order[3].tolist()) == list(range(5))


def test_step_can_be_asked_for_in_any_order() -> None:
    forwards, backwards = EpochOrder(22, 4, 1, "a"), EpochOrder(22, 4, 1, "a")
    one = [forwards[step] for step in range(13)]
    other = [backwards[step] for step in reversed(range(13))]
    assert all(torch.equal(a, b) for a, b in zip(one, reversed(other), strict=True))


def test_order_depends_on_its_key() -> None:
    assert not torch.equal(EpochOrder(50, 50, 1, "student")[0], EpochOrder(50, 50, 1, "aggregator")[0])
    assert not torch.equal(EpochOrder(50, 50, 1)[0], EpochOrder(50, 50, 2)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_gives_the_steps_in_order_from_start_to_stop(workers: int) -> None:
    steps = [int(batch[0]) for batch in stream(_numbered, start=3, stop=9, workers=workers)]
    assert steps == [3, 4, 5, 6, 7, 8]


def test_stream_that_has_nothing_left_is_empty() -> None:
    assert list(stream(_numbered, start=9, stop=9)) == []


def test_batch_holds_images_of_the_given_members_with_their_labels() -> None:
    members = torch.tensor([1, 4, 6, 9])
    make = SupervisedBatches(Numbers(10), members, batch_size=2, key=(1,))
    assert make.steps_per_epoch == 2
    epoch = [make(step) for step in range(2)]
    images, labels = torch.cat([images for images, _ in epoch]), torch.cat([labels for _, labels in epoch])
    assert sorted(images[:, 0].tolist()) == members.tolist()
    assert torch.equal(labels, images[:, 0].long() * 10)


def test_every_step_draws_fresh_images() -> None:
    make = SupervisedBatches(Numbers(10), torch.arange(10), batch_size=2, key=(1,))
    draws = {float(make(step)[0][0, 1]) for step in range(20)}
    assert len(draws) == 20
    assert 0.0 not in draws


def test_batch_is_a_function_of_key_and_step() -> None:
    numbers = Numbers(10)
    one, other, another = (SupervisedBatches(numbers, torch.arange(10), batch_size=5, key=(seed,)) for seed in (1, 1, 2))
    other(0)
    assert torch.equal(one(7)[0], other(7)[0])
    assert not torch.equal(one(7)[0], another(7)[0])
