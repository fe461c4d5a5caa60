"""The protocol of testing: each domain on its own, adapt once, predict everything; then the metrics over all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmoe.console import progress_over
from dmoe.data.base import DomainDataset
from dmoe.data.streams import stored_images
from dmoe.errors import UserError
from dmoe.models.student import Student


class Method(Protocol):
    """Anything that turns unlabeled images of a domain ``[B, C, H, W]`` into a student for that domain."""

    def adapt(self, images: Tensor) -> Student: ...


@dataclass(frozen=True)
class Evaluation:
    """What one method reached on one split.

    Attributes:
        overall: the data set's metrics over the predictions of all domains together.
        domains: the task's metrics of each domain, by its number.
        predictions: ``[n]``, by image number; of images that are not scored too.
        selection_metric: the key of ``overall`` by which to choose.
        headline: the key of the metrics of a domain that says most.
    """

    overall: Mapping[str, float]
    domains: Mapping[int, Mapping[str, float]]
    predictions: Tensor
    selection_metric: str
    headline: str

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
    method: Method,
    dataset: DomainDataset,
    split: str,
    *,
    support_size: int,
    batch_size: int,
    score_support: bool = True,
    support_from: Mapping[int, int] | None = None,
    workers: int = 0,
    name: str | None = None,
) -> Evaluation:
    """Adapt to the first ``support_size`` images of each domain, in data-set order, and predict all of its images.

    Every domain starts from the same model. A domain with fewer images is adapted to with those it has.

    Args:
        score_support: whether the support images count in the metrics; a domain with no others is then left out of them.
        support_from: another domain to take the support images from, by domain: a control.
        workers: processes that read images ahead.
        name: of a progress bar; None: no bar.

    Raises:
        UserError: support images are not scored and no domain has any others, or an image cannot be read.
    """
    images, task = dataset.splits[split], dataset.task
    reads: list[Tensor] = []  # for each domain its support, then its batches
    for domain, members in images.members.items():
        support = images.members[support_from[domain]] if support_from else members
        reads += [support[:support_size], *members.split(batch_size)]
    batches = stored_images(images, reads, workers=workers)

    predictions = torch.zeros(len(images), dtype=torch.float32 if task.kind == "regression" else torch.int64)
    scored: list[Tensor] = []
    domains: dict[int, Mapping[str, float]] = {}
    for domain, members in progress_over(images.members.items(), name=name, unit="domain"):
        student = method.adapt(next(batches))
        for index in members.split(batch_size):
            predictions[index] = task.predictions(student.logits(next(batches))).cpu().to(predictions.dtype)
        counted = members if score_support else members[support_size:]
        if len(counted):
            scored.append(counted)
            domains[domain] = task.metrics(predictions[counted], images.labels[counted])
    if not scored:
        raise UserError(f"evaluation.support_size: no domain has more than {support_size} images, and none is left to score")
    together = torch.cat(scored)
    overall = dataset.metrics(split, together, predictions[together])
    return Evaluation(overall, domains, predictions, dataset.selection_metric, task.headline)
