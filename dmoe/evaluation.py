"""Testing: methods adapt and predict by a protocol; then the metrics, of each domain and over all."""

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmoe.console import progress_over
from dmoe.data.base import DomainDataset
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
    """:func:`evaluate_all` of one method."""
    return evaluate_all({"": method}, dataset, split, protocol, batch_size=batch_size, workers=workers, world=world)[""]


def evaluate_all(
    methods: Mapping[str, Method | WithTokens],
    dataset: DomainDataset,
    split: str,
    protocol: Protocol,
    *,
    batch_size: int,
    workers: int = 0,
    name: str | None = None,
    world: World = ALONE,
) -> dict[str, Evaluation]:
    """Adapt to unlabeled images and predict, as the protocol says. An image is read once, however many methods there are.

    Args:
        methods: by names.
        batch_size: images predicted at a time, where all of a domain are.
        workers: processes that read images ahead.
        name: of a progress bar; None: no bar.
        world: the processes that share the work; each ends with the whole result.

    Raises:
        UserError: support images are not scored and no domain has any others, or an image cannot be read.
    """
    images, task = dataset.splits[split], dataset.task
    scored = protocol.scored(images)
    here = world.share(protocol.chains(images, batch_size))
    reads: list[Tensor] = []
    for visit in (visit for chain in here for visit in chain):
        reads += [visit.support, *(index for index in visit.predicted if index is not visit.support)]
    batches = stored_images(images, reads, workers=workers)

    kind = torch.float32 if task.kind == "regression" else torch.int64
    predictions = {method: torch.zeros(len(images), dtype=kind) for method in methods}
    diagnoses: dict[str, dict[int, Diagnosis]] = {method: {} for method in methods}
    for chain in progress_over(here, name=name, unit="domain" if protocol.kind == "per domain" else "batch"):
        students: dict[str, Student] = {}
        for visit in chain:
            unlabeled, before = next(batches), students
            students = {each: _adapted(methods[each], unlabeled, visit.support, before.get(each)) for each in methods}
            for method, student in students.items():
                if student.diagnosis.ranges and protocol.kind == "per domain":
                    diagnoses[method][int(images.domains[visit.predicted[0][0]])] = student.diagnosis
            asked = before if before and protocol.predict == "before" else students
            for index in visit.predicted:
                batch = unlabeled if index is visit.support else next(batches)
                for method, student in asked.items():
                    predictions[method][index] = task.predictions(student.logits(batch)).cpu().to(kind)
    world.add_up(list(predictions.values()))  # zero but in one of the processes
    for others in world.gathered(diagnoses):
        for method, found in others.items():
            diagnoses[method] |= found
    return {method: judged(dataset, split, predictions[method], scored, diagnoses[method]) for method in methods}


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
