"""The protocol of testing: what is adapted to, what is predicted, and what is scored."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.diagnosis import Diagnosis, Range
from dmoe.evaluation import Evaluation, WithTokens, evaluate, evaluate_all
from dmoe.models.student import Student
from dmoe.protocols import Protocol
from dmoe.tasks import Task

TASK = Task("multiclass", num_outputs=3)
DOMAINS = torch.tensor([7, 2, 7, 7, 2, 30, 7, 2, 7, 2])
MEMBERS = {2: [1, 4, 7, 9], 7: [0, 2, 3, 6, 8], 30: [5]}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0, 1, 1])


class Numbered(DomainSplit):
    """Image i is the number i; the domains are mixed up in the data set and their numbers have gaps."""

    def __init__(self, labels: Tensor = LABELS) -> None:
        self.labels, self.domains, self.group_domains = labels, DOMAINS, DOMAINS
        self.domain_names: Mapping[int, str] = {}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        assert draw is None
        return index.float().view(-1, 1, 1, 1)


class Guess:
    """A student that predicts (image number + first support image) modulo 3, so that what it was adapted to shows."""

    diagnosis = Diagnosis()

    def __init__(self, support: Tensor) -> None:
        self.offset = int(support.flatten()[0])

    def logits(self, images: Tensor, **_: Any) -> Tensor:
        return torch.nn.functional.one_hot((images.flatten().long() + self.offset) % 3, 3).float()


class Recorder:
    """A method that remembers what it was given."""

    def __init__(self) -> None:
        self.supports: list[list[int]] = []

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        self.supports.append(images.flatten().int().tolist())
        return cast(Student, Guess(images))


def dataset(split: DomainSplit, task: Task = TASK, **facts: Any) -> DomainDataset:
    transform = ImageTransform((1, 1, 1))
    return DomainDataset("numbers", {"target": split}, task, transform, class_names=(), fingerprint="", **facts)


def evaluated(
    method: Recorder | None = None, *, support_size: int = 2, batch_size: int = 3, workers: int = 0, **protocol: Any
) -> Evaluation:
    numbers = dataset(Numbered())
    found = Protocol(support_size, **protocol)
    return evaluate(method or Recorder(), numbers, "target", found, batch_size=batch_size, workers=workers)


def guesses(offsets: Mapping[int, int]) -> Tensor:
    """What all images are predicted as when the first support image of each domain has that number."""
    return torch.tensor([(image + offsets[int(domain)]) % 3 for image, domain in enumerate(DOMAINS)])


OWN_FIRST = {2: 1, 7: 0, 30: 5}


def test_support_is_the_first_images_of_each_domain_in_data_set_order() -> None:
    method = Recorder()
    evaluated(method)
    assert sorted(method.supports) == [[0, 2], [1, 4], [5]]


def test_a_domain_smaller_than_the_support_is_adapted_to_with_what_it_has() -> None:
    method = Recorder()
    evaluated(method, support_size=100)
    assert sorted(method.supports) == sorted(MEMBERS.values())


def test_all_images_are_predicted_by_the_student_of_their_domain() -> None:
    assert torch.equal(evaluated().predictions, guesses(OWN_FIRST))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    assert evaluated(batch_size=batch_size).overall == evaluated().overall


def test_metrics_are_those_of_the_pooled_predictions() -> None:
    found, predictions = evaluated(), guesses(OWN_FIRST)
    assert found.overall["accuracy"] == pytest.approx(accuracy_score(LABELS, predictions))
    assert found.overall["macro_f1"] == pytest.approx(f1_score(LABELS, predictions, average="macro"))
    assert found.score == found.overall["accuracy"]


def test_metrics_of_a_domain_are_those_of_its_images() -> None:
    found, predictions = evaluated(), guesses(OWN_FIRST)
    expected = {domain: accuracy_score(LABELS[index], predictions[index]) for domain, index in MEMBERS.items()}
    assert {domain: metrics["accuracy"] for domain, metrics in found.domains.items()} == pytest.approx(expected)
    assert found.mean == pytest.approx(sum(expected.values()) / 3)
    assert found.worst == pytest.approx(min(expected.values()))
    assert found.mean != pytest.approx(found.score)  # small domains weigh as much as large ones in the one, not in the other


def test_support_images_can_be_left_out_of_the_metrics() -> None:
    found, predictions = evaluated(score_support=False), guesses(OWN_FIRST)
    scored = [7, 9, 3, 6, 8]
    assert found.overall["accuracy"] == pytest.approx(accuracy_score(LABELS[scored], predictions[scored]))
    assert found.domains[2]["accuracy"] == pytest.approx(accuracy_score(LABELS[[7, 9]], predictions[[7, 9]]))
    assert torch.equal(found.predictions, predictions)


def test_a_domain_with_nothing_but_support_is_left_out_when_support_is_not_scored() -> None:
    assert set(evaluated(score_support=False).domains) == {2, 7}
    assert set(evaluated(score_support=True).domains) == {2, 7, 30}


def test_support_can_be_taken_from_another_domain() -> None:
    method = Recorder()
    found = evaluated(method, support_from={2: 7, 7: 30, 30: 2})
    assert sorted(method.supports) == [[0, 2], [1, 4], [5]]
    assert torch.equal(found.predictions, guesses({2: 0, 7: 5, 30: 1}))


def test_predictions_of_a_regression_are_values() -> None:
    class Half:
        diagnosis = Diagnosis()

        def logits(self, images: Tensor, **_: Any) -> Tensor:
            return images.flatten(1) / 2

    class Method:
        def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
            return cast(Student, Half())

    values = dataset(Numbered(labels=torch.arange(10) / 2 + torch.tensor([1, -1] * 5)), Task("regression", num_outputs=1))
    found = evaluate(Method(), values, "target", Protocol(1), batch_size=4)
    assert found.predictions.tolist() == [i / 2 for i in range(10)]
    assert found.overall["mse"] == pytest.approx(1)
    assert found.score == found.overall["r"]


def test_diagnoses_of_domains_are_kept_where_there_are_ranges() -> None:
    class Watched(Recorder):
        def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
            guess = Guess(images)
            guess.diagnosis = Diagnosis({"a": float(guess.offset)}, {"a": Range(0.0, 2.0)}, images=len(images))
            return cast(Student, guess)

    found = evaluate_all({"plain": Recorder(), "watched": Watched()}, dataset(Numbered()), "target", [Protocol(2)], batch_size=3)
    (plain,), (watched,) = found["plain"], found["watched"]
    assert plain.diagnoses == {}
    assert {domain: one.suspect for domain, one in watched.diagnoses.items()} == {2: False, 7: False, 30: True}
    assert torch.equal(watched.predictions, plain.predictions)


def test_the_data_set_may_have_metrics_of_its_own() -> None:
    seen: list[tuple[str, list[int], list[int]]] = []

    def official(split: str, index: Tensor, predictions: Tensor) -> Mapping[str, float]:
        seen.append((split, index.tolist(), predictions.tolist()))
        return {"first": 0.25, "second": 0.5}

    numbers = dataset(Numbered(), official_metrics=official, selection_metric="second")
    found = evaluate(Recorder(), numbers, "target", Protocol(2), batch_size=3)
    assert found.overall == {"first": 0.25, "second": 0.5}
    assert found.score == 0.5
    assert found.mean == evaluated().mean, "domains are judged by the task's metrics all the same"
    (split, index, predictions) = seen[0]
    assert split == "target" and sorted(index) == list(range(10)) and len(seen) == 1
    assert predictions == guesses(OWN_FIRST)[index].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_read_ahead_change_nothing(workers: int) -> None:
    assert evaluated(workers=workers).overall == evaluated().overall


def test_a_domain_whose_metric_is_not_a_number_is_left_out_of_mean_and_worst() -> None:
    metrics = {1: {"r": 0.5}, 2: {"r": math.nan}, 3: {"r": 0.1}}
    found = Evaluation({}, metrics, torch.zeros(0), selection_metric="r", headline="r")
    assert (found.mean, found.worst) == (pytest.approx(0.3), 0.1)


def test_several_methods_share_one_reading_of_the_images() -> None:
    class Counting(Numbered):
        read = 0

        def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
            self.read += len(index)
            return super().images(index, view=view, draw=draw)

    alone, shared = Counting(), Counting()
    one = evaluate(Recorder(), dataset(alone), "target", Protocol(2), batch_size=3)
    found = evaluate_all({"a": Recorder(), "b": Recorder()}, dataset(shared), "target", [Protocol(2)], batch_size=3)
    assert shared.read == alone.read == 10 + 2 + 2, "of domain 30 there is but one image"
    assert list(found) == ["a", "b"]
    assert all(torch.equal(evaluation.predictions, one.predictions) for (evaluation,) in found.values())


class Remembering(Recorder):
    """What it returns depends on all that was adapted to before."""

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        guess = cast(Guess, super().adapt(images))
        guess.offset += 2 * cast(Guess, start).offset if start is not None else 0
        return cast(Student, guess)


def test_protocols_together_say_what_each_says_alone_and_adapt_once_to_what_they_share() -> None:
    once, moved = Protocol(2), Protocol(2, support_from={2: 7, 7: 30, 30: 2})
    streams = [Protocol(2, kind="per batch", images=4), Protocol(2, kind="mixed stream"), Protocol(2, kind="label-skewed stream")]
    lasting = [Protocol(2, kind="continual"), Protocol(2, kind="continual", predict="before")]
    together = [once, replace(once, score_support=False), replace(once, support_size=1), moved, *streams, *lasting]
    method = Remembering()
    found = evaluate_all({"": method}, dataset(Numbered()), "target", together, batch_size=3)[""]
    for protocol, evaluation in zip(together, found, strict=True):
        alone = evaluate(Remembering(), dataset(Numbered()), "target", protocol, batch_size=3)
        assert torch.equal(evaluation.predictions, alone.predictions) and evaluation.overall == alone.overall, str(protocol)
    assert [method.supports.count(support) for support in ([1, 4], [0, 2], [1], [7, 9])] == [1 + 1, 1 + 1, 1, 1 + 1]


@pytest.mark.parametrize("support_from", [None, {2: 7, 7: 30, 30: 2}])
def test_stored_tokens_handed_over_are_those_of_the_support_images(support_from: dict[int, int] | None) -> None:
    class Told:
        def __init__(self) -> None:
            self.tokens: list[list[int]] = []

        def adapt(self, images: Tensor, *, tokens: Tensor | None = None, start: Student | None = None) -> Student:
            assert tokens is not None
            assert torch.equal(tokens.flatten(), 100 * images.flatten())
            self.tokens.append(tokens.flatten().int().tolist())
            return cast(Student, Guess(images))

    told = Told()
    stored = WithTokens(told, lambda index: 100 * index.float().view(-1, 1, 1))
    evaluate(stored, dataset(Numbered()), "target", Protocol(2, support_from=support_from), batch_size=3)
    assert len(told.tokens) == 3
