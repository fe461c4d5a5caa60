"""Testing: methods adapt and predict by a protocol; then the metrics, of each domain and over all."""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmoe.console import progress_over
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.streams import stored_images
from dmoe.diagnosis import Diagnosis
from dmoe.distributed import ALONE, World
from dmoe.models.student import Student
from dmoe.protocols import Protocol


class Method(typing.Protocol):
    """Anything that turns unlabeled images of a domain ``[B, C, H, W]`` into a student for that domain.

    Adapting changes nothing else. It begins with ``start``, a student that the method returned earlier, or with the source model.
    """

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student: ...


class ByTokens(typing.Protocol):
    """A method that need not ask the experts where it is told the tokens ``[B, N, D]`` of the images."""

    def adapt(self, images: Tensor, *, tokens: Tensor | None = None, start: Student | None = None) -> Student: ...


@dataclass(frozen=True)
class WithTokens:
    """A method and where the tokens of the split's images are stored, by image number ``[B]``."""

    method: ByTokens
    stored: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What one method reached on one split.

    Attributes:
        overall: the data set's metrics over the predictions of all domains together.
        domains: the task's metrics of each domain, by its number.
        predictions: ``[n]``, by image number; of images that are not scored too.
        selection_metric: the key of ``overall`` by which to choose.
        headline: the key of the metrics of a domain that says most.
        diagnoses: of each domain, by its number, what its support images were adapted to as; none where that is not watched.
    """

    overall: Mapping[str, float]
    domains: Mapping[int, Mapping[str, float]]
    predictions: Tensor
    selection_metric: str
    headline: str
    diagnoses: Mapping[int, Diagnosis] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The selection metric over all images."""
        return self.overall[self.selection_metric]

    @property
    def mean(self) -> float:
        """The headline metric, averaged over domains; those where it is not a number are left out."""
        known = self._by_domain
        return sum(known) / len(known) if known else float("nan")

    @property
    def worst(self) -> float:
        """The headline metric of the worst domain."""
        return min(self._by_domain, default=float("nan"))

    @property
    def _by_domain(self) -> list[float]:
        values = [metrics[self.headline] for metrics in self.domains.values()]
        return [value for value in values if not math.isnan(value)]


def evaluate(
    method: Method | WithTokens,
    dataset: DomainDataset,
    split: str,
    protocol: Protocol,
    *,
    batch_size: int,
    workers: int = 0,
    world: World = ALONE,
) -> Evaluation:
    """:func:`evaluate_all` of one method by one protocol."""
    methods, protocols = {"": method}, [protocol]
    return evaluate_all(methods, dataset, split, protocols, batch_size=batch_size, workers=workers, world=world)[""][0]


def evaluate_all(
    methods: Mapping[str, Method | WithTokens],
    dataset: DomainDataset,
    split: str,
    protocols: Sequence[Protocol],
    *,
    batch_size: int,
    workers: int = 0,
    name: str | None = None,
    world: World = ALONE,
) -> dict[str, list[Evaluation]]:
    """Adapt to unlabeled images and predict, as each protocol says. What several protocols adapt to is adapted to once.

    Args:
        methods: by names; an image is read once for all of them.
        batch_size: images predicted at a time, where all of a domain are.
        workers: processes that read images ahead.
        name: of a progress bar; None: no bar.
        world: the processes that share the work; each ends with the whole result.

    Returns:
        Of each method, in the order of the protocols.

    Raises:
        UserError: support images are not scored and no domain has any others, or an image cannot be read.
    """
    images, task = dataset.splits[split], dataset.task
    scored = [protocol.scored(images) for protocol in protocols]
    here = world.share(chains_of(protocols, images, batch_size))
    batches = stored_images(images, [index for chain in here for step in chain for index in step.reads], workers=workers)

    kind = torch.float32 if task.kind == "regression" else torch.int64
    predictions = {(method, number): torch.zeros(len(images), dtype=kind) for method in methods for number in range(len(protocols))}
    diagnoses: dict[tuple[str, int], dict[int, Diagnosis]] = {key: {} for key in predictions}
    for chain in progress_over(here, name=name, unit="domain" if protocols[0].kind == "per domain" else "batch"):
        students: dict[str, Student] = {}
        for step in chain:
            unlabeled, before = next(batches), students
            students = {each: _adapted(methods[each], unlabeled, step.support, before.get(each)) for each in methods}
            for number, index in step.predicted:
                batch = unlabeled if torch.equal(index, step.support) else next(batches)
                asked = before if before and protocols[number].predict == "before" else students
                for method, student in asked.items():
                    predictions[method, number][index] = task.predictions(student.logits(batch)).cpu().to(kind)
                    if student.diagnosis.ranges and protocols[number].kind == "per domain":
                        diagnoses[method, number][int(images.domains[index[0]])] = student.diagnosis
    world.add_up(list(predictions.values()))  # zero but in one of the processes
    for others in world.gathered(diagnoses):
        for key, found in others.items():
            diagnoses[key] |= found
    return {
        method: [
            judged(dataset, split, predictions[method, number], counted, diagnoses[method, number])
            for number, counted in enumerate(scored)
        ]
        for method in methods
    }


@dataclass(frozen=True)
class Step:
    """Image numbers adapted to ``[B]``, and batches of them then predicted, each with the number of the protocol it is for."""

    support: Tensor
    predicted: list[tuple[int, Tensor]]

    @property
    def reads(self) -> list[Tensor]:
        """The images in the order in which they are needed."""
        return [self.support, *(index for _, index in self.predicted if not torch.equal(index, self.support))]


def chains_of(protocols: Sequence[Protocol], split: DomainSplit, batch_size: int) -> list[list[Step]]:
    """The chains of all protocols; those that adapt to the same images in the same order are one."""
    chains: dict[tuple[bytes, ...], list[Step]] = {}
    for number, protocol in enumerate(protocols):
        for visits in protocol.chains(split, batch_size):
            supports = tuple(visit.support.numpy().tobytes() for visit in visits)
            for step, visit in zip(chains.setdefault(supports, [Step(visit.support, []) for visit in visits]), visits, strict=True):
                step.predicted.extend((number, index) for index in visit.predicted)
    return list(chains.values())


def _adapted(method: Method | WithTokens, images: Tensor, index: Tensor, start: Student | None) -> Student:
    if isinstance(method, WithTokens):
        return method.method.adapt(images, tokens=method.stored(index), start=start)
    return method.adapt(images, start=start)


def judged(
    dataset: DomainDataset,
    split: str,
    predictions: Tensor,
    scored: Mapping[int, Tensor],
    diagnoses: Mapping[int, Diagnosis] | None = None,
) -> Evaluation:
    """Predictions ``[n]`` of a split, judged by the images ``scored`` of each domain."""
    task, labels = dataset.task, dataset.splits[split].labels
    domains = {domain: task.metrics(predictions[counted], labels[counted]) for domain, counted in scored.items()}
    together = torch.cat(list(scored.values()))
    overall = dataset.metrics(split, together, predictions[together])
    return Evaluation(overall, domains, predictions, dataset.selection_metric, task.headline, diagnoses or {})
