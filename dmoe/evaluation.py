"""The protocol of testing: each domain on its own, adapt once, predict everything; then the metrics over all."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dmoe.console import progress_over
from dmoe.data.base import DomainDataset
from dmoe.data.streams import stored_images
from dmoe.diagnosis import Diagnosis
from dmoe.distributed import ALONE, World
from dmoe.errors import UserError
from dmoe.models.student import Student


class Method(Protocol):
    """Anything that turns unlabeled images of a domain ``[B, C, H, W]`` into a student for that domain.

    ``start`` is a student that the method returned before, to go on from; None: the one that every domain starts from.
    """

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student: ...


class ByTokens(Protocol):
    """A method that need not ask the experts where it is told the tokens ``[B, N, D]`` of the images."""

    def adapt(self, images: Tensor, *, tokens: Tensor | None = None) -> Student: ...


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


def evaluate(method: Method | WithTokens, dataset: DomainDataset, split: str, **protocol: Any) -> Evaluation:
    """:func:`evaluate_all` of one method."""
    return evaluate_all({"": method}, dataset, split, **protocol)[""]


def evaluate_all(
    methods: Mapping[str, Method | WithTokens],
    dataset: DomainDataset,
    split: str,
    *,
    support_size: int,
    batch_size: int,
    score_support: bool = True,
    support_from: Mapping[int, int] | None = None,
    workers: int = 0,
    name: str | None = None,
    world: World = ALONE,
) -> dict[str, Evaluation]:
    """Adapt to the first ``support_size`` images of each domain, in data-set order, and predict all of its images.

    Every domain starts from the same model. A domain with fewer images is adapted to with those it has. An image is read once,
    however many methods there are.

    Args:
        methods: by names.
        score_support: whether the support images count in the metrics; a domain with no others is then left out of them.
        support_from: another domain to take the support images from, by domain: a control.
        workers: processes that read images ahead.
        name: of a progress bar; None: no bar.
        world: the processes that share the domains; each ends with the whole result.

    Raises:
        UserError: support images are not scored and no domain has any others, or an image cannot be read.
    """
    images, task = dataset.splits[split], dataset.task
    supports = {domain: images.members[support_from[domain] if support_from else domain] for domain in images.members}
    supports = {domain: members[:support_size] for domain, members in supports.items()}
    here = dict(world.share(images.members.items()))
    reads: list[Tensor] = []  # for each domain its support, then its batches
    for domain, members in here.items():
        reads += [supports[domain], *members.split(batch_size)]
    batches = stored_images(images, reads, workers=workers)

    kind = torch.float32 if task.kind == "regression" else torch.int64
    predictions = {method: torch.zeros(len(images), dtype=kind) for method in methods}
    diagnoses: dict[str, dict[int, Diagnosis]] = {method: {} for method in methods}
    scored: dict[int, Tensor] = {}
    for domain, members in progress_over(here.items(), name=name, unit="domain"):
        unlabeled = next(batches)
        students = {method: _adapted(methods[method], unlabeled, supports[domain]) for method in methods}
        for method, student in students.items():
            if student.diagnosis.ranges:
                diagnoses[method][domain] = student.diagnosis
        for index in members.split(batch_size):
            batch = next(batches)
            for method, student in students.items():
                predictions[method][index] = task.predictions(student.logits(batch)).cpu().to(kind)
    world.add_up(list(predictions.values()))  # zero but in one of the processes
    for others in world.gathered(diagnoses):
        for method, found in others.items():
            diagnoses[method] |= found
    for domain, members in images.members.items():
        counted = members if score_support else members[support_size:]
        if len(counted):
            scored[domain] = counted
    if not scored:
        raise UserError(f"evaluation.support_size: no domain has more than {support_size} images, and none is left to score")
    return {method: _judged(dataset, split, predictions[method], scored, diagnoses[method]) for method in methods}


def _adapted(method: Method | WithTokens, images: Tensor, index: Tensor) -> Student:
    if isinstance(method, WithTokens):
        return method.method.adapt(images, tokens=method.stored(index))
    return method.adapt(images)


def _judged(
    dataset: DomainDataset,
    split: str,
    predictions: Tensor,
    scored: Mapping[int, Tensor],
    diagnoses: Mapping[int, Diagnosis],
) -> Evaluation:
    task, labels = dataset.task, dataset.splits[split].labels
    domains = {domain: task.metrics(predictions[counted], labels[counted]) for domain, counted in scored.items()}
    together = torch.cat(list(scored.values()))
    overall = dataset.metrics(split, together, predictions[together])
    return Evaluation(overall, domains, predictions, dataset.selection_metric, task.headline, diagnoses)
