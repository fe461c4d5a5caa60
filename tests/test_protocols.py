"""How a method meets unseen domains: what is adapted to, from where, and what is predicted and scored."""

from collections.abc import Mapping
from typing import cast

import pytest
import torch
from torch import Tensor

from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.diagnosis import Diagnosis
from dmoe.errors import UserError
from dmoe.evaluation import Evaluation, evaluate
from dmoe.models.student import Student
from dmoe.protocols import KINDS, Protocol
from dmoe.tasks import Task

DOMAINS = torch.tensor([7, 2, 7, 7, 2, 30, 7, 2, 7, 2])
LABELS = torch.tensor([2, 1, 0, 0, 1, 2, 1, 0, 1, 1])


class Numbered(DomainSplit):
    """Image i is the number i."""

    def __init__(self) -> None:
        self.labels, self.domains, self.group_domains = LABELS, DOMAINS, DOMAINS
        self.domain_names: Mapping[int, str] = {}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return index.float().view(-1, 1, 1, 1)


class Counter:
    """A student that predicts how many images it has ever been adapted to, modulo 3."""

    diagnosis = Diagnosis()

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def logits(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(images),), self.seen % 3), 3).float()


class Counting:
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        seen = cast(Counter, start).seen if start else 0
        return cast(Student, Counter(seen + len(images)))


def found(protocol: Protocol) -> Evaluation:
    task = Task("multiclass", num_outputs=3)
    dataset = DomainDataset("numbers", {"target": Numbered()}, task, ImageTransform((1, 1, 1)), class_names=(), fingerprint="")
    return evaluate(Counting(), dataset, "target", protocol, batch_size=3)


def batches(protocol: Protocol) -> list[list[list[int]]]:
    """The images adapted to, by chain."""
    return [[visit.support.tolist() for visit in chain] for chain in protocol.chains(Numbered(), 3)]


def test_per_batch_adapts_to_each_batch_from_the_source_model() -> None:
    protocol = Protocol(2, "per batch")
    assert batches(protocol) == [[[1, 4]], [[7, 9]], [[0, 2]], [[3, 6]], [[8]], [[5]]]
    expected = torch.full((10,), 2)
    expected[[8, 5]] = 1
    assert torch.equal(found(protocol).predictions, expected)


def test_continual_goes_on_through_one_domain_after_the_other() -> None:
    protocol = Protocol(2, "continual")
    assert batches(protocol) == [[[1, 4], [7, 9], [0, 2], [3, 6], [8], [5]]]
    seen = {1: 2, 4: 2, 7: 4, 9: 4, 0: 6, 2: 6, 3: 8, 6: 8, 8: 9, 5: 10}
    assert found(protocol).predictions.tolist() == [seen[image] % 3 for image in range(10)]


def test_predicted_before_the_update_by_what_the_batches_before_left() -> None:
    seen = {1: 2, 4: 2, 7: 2, 9: 2, 0: 4, 2: 4, 3: 6, 6: 6, 8: 8, 5: 9}
    assert found(Protocol(2, "continual", predict="before")).predictions.tolist() == [seen[image] % 3 for image in range(10)]


def test_mixed_batches_hold_every_image_once_and_several_domains() -> None:
    chains = batches(Protocol(4, "mixed batches"))
    assert sorted(image for chain in chains for batch in chain for image in batch) == list(range(10))
    assert all(len(chain) == 1 for chain in chains)
    assert len(DOMAINS[chains[0][0]].unique()) > 1
    assert chains == batches(Protocol(4, "mixed batches")), "drawn the same way each time"


def test_skewed_batches_are_of_one_domain_and_sorted_by_class() -> None:
    chains = batches(Protocol(2, "skewed batches"))
    assert chains == [[[7, 1]], [[4, 9]], [[2, 3]], [[6, 8]], [[0]], [[5]]]


def test_only_the_first_images_of_a_domain_may_go_into_batches() -> None:
    protocol = Protocol(2, "per batch", images=3)
    assert batches(protocol) == [[[1, 4]], [[7]], [[0, 2]], [[3]], [[5]]]
    assert {domain: index.tolist() for domain, index in protocol.scored(Numbered()).items()} == {
        2: [1, 4, 7],
        7: [0, 2, 3],
        30: [5],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_is_what_is_scored(kind: str) -> None:
    protocol = Protocol(2, kind)  # type: ignore[arg-type]
    predicted = [
        image for chain in protocol.chains(Numbered(), 3) for visit in chain for batch in visit.predicted for image in batch
    ]
    scored = [image for counted in protocol.scored(Numbered()).values() for image in counted]
    assert sorted(map(int, predicted)) == sorted(map(int, scored)) == list(range(10))


def test_nothing_left_to_score_is_one_line() -> None:
    with pytest.raises(UserError, match=r"evaluation\.support_size: no domain has more than 5 images"):
        Protocol(5, score_support=False).scored(Numbered())


def test_a_protocol_says_what_it_is() -> None:
    assert str(Protocol(64)) == "per domain, support 64"
    assert str(Protocol(8, score_support=False)) == "per domain, support 8, support not scored"
    assert str(Protocol(64, "continual", predict="before")) == "continual, support 64, predicted before the update"
    assert str(Protocol(64, support_from={1: 2})) == "per domain, support 64, support from another domain"
