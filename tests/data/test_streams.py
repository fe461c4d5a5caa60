"""What a step trains on is a pure function of the step."""

import pytest
import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.data.streams import DomainBatches, EpochOrder, SupervisedBatches, stream
from dmoe.errors import UserError


class Numbers(DomainSplit):
    """Images that say their own number and the draw they were asked with; they are dealt out to the domains 5, 6, ... in turn."""

    def __init__(self, count: int, *, domains: int = 1) -> None:
        self.labels = torch.arange(count) * 10
        self.domains = self.group_domains = 5 + torch.arange(count) % domains
        self.domain_names = {}

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
    images, labels = torch.cat([images for images, _, _ in epoch]), torch.cat([labels for _, labels, _ in epoch])
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


def of_domains(count: int, *, batch_size: int, domains: int, of: int, seed: int = 1) -> DomainBatches:
    return DomainBatches(Numbers(count, domains=of), torch.arange(count), batch_size=batch_size, domains=domains, key=(seed,))


def test_batch_has_equally_many_images_of_some_domains() -> None:
    make = of_domains(60, batch_size=14, domains=3, of=6)
    chosen = set()
    for step in range(20):
        images, labels, domains = make(step)
        numbers, counts = domains.unique(return_counts=True)
        assert counts.tolist() == [4, 4, 4]
        chosen |= set(numbers.tolist())
        number = images[:, 0].long()
        assert torch.equal(domains, 5 + number % 6) and torch.equal(labels, 10 * number)
        assert len(number.unique()) == 12
    assert chosen == {5, 6, 7, 8, 9, 10}
    assert make.steps_per_epoch == 5


def test_every_image_of_a_domain_comes_sometimes() -> None:
    make = of_domains(20, batch_size=4, domains=2, of=2)
    assert set(torch.cat([make.index(step) for step in range(60)]).tolist()) == set(range(20))


def test_batch_of_domains_is_a_function_of_key_and_step() -> None:
    one, other, another = (of_domains(60, batch_size=12, domains=3, of=6, seed=seed) for seed in (1, 1, 2))
    other(0)
    assert all(torch.equal(a, b) for a, b in zip(one(7), other(7), strict=True))
    assert not torch.equal(one.index(7), another.index(7))
    assert not torch.equal(one.index(7), one.index(8))


def test_domain_with_too_few_images_gives_each_before_any_comes_again() -> None:
    make = of_domains(6, batch_size=10, domains=2, of=2)
    _, counts = make.index(0).unique(return_counts=True)
    assert sorted(counts.tolist()) == [1, 1, 2, 2, 2, 2]


def test_only_members_are_taken_and_no_more_domains_than_they_have() -> None:
    members = torch.tensor([0, 1, 6, 7, 12, 13])
    make = DomainBatches(Numbers(60, domains=6), members, batch_size=8, domains=5, key=(1,))
    seen = torch.cat([make.index(step) for step in range(10)])
    assert set(seen.tolist()) == set(members.tolist())
    assert len(make.index(0)) == 8


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(UserError, match=r"there is one only$"):
        of_domains(20, batch_size=8, domains=2, of=1)
    with pytest.raises(UserError, match=r"batch_size: must be at least 6, two images of each domain, got 5$"):
        of_domains(20, batch_size=5, domains=3, of=4)
