"""The protocol of testing: each domain on its own, adapt once, predict everything; then one metric over all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmoe.console import progress_over
from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.models.student import Student
from dmoe.tasks import Task


class Method(Protocol):
    """Anything that turns unlabeled images of a domain ``[B, C, H, W]`` into a student for that domain."""

    def adapt(self, images: Tensor) -> Student: ...


@dataclass(frozen=True)
class Evaluation:
    """What one method reached on one split.

    Attributes:
        overall: metrics over the predictions of all domains together.
        domains: the same metrics of each domain, by its number.
        predictions: ``[n]``, by image number; of images that are not scored too.
    """

    task: Task
    overall: Mapping[str, float]
    domains: Mapping[int, Mapping[str, float]]
    predictions: Tensor

    @property
    def score(self) -> float:
        """The selection metric over all images."""
        return self.overall[self.task.selection_metric]

    @property
    def mean(self) -> float:
        """The selection metric, averaged over domains."""
        return sum(self._by_domain) / len(self._by_domain)

    @property
    def worst(self) -> float:
        """The selection metric of the worst domain."""
        return min(self._by_domain)

    @property
    def _by_domain(self) -> list[float]:
        return [metrics[self.task.selection_metric] for metrics in self.domains.values()]


def evaluate(
    method: Method,
    split: DomainSplit,
    *,
    task: Task,
    support_size: int,
    batch_size: int,
    score_support: bool = True,
    support_from: Mapping[int, int] | None = None,
    name: str | None = None,
) -> Evaluation:
    """Adapt to the first ``support_size`` images of each domain, in data-set order, and predict all of its images.

    Every domain starts from the same model. A domain with fewer images is adapted to with those it has.

    Args:
        score_support: whether the support images count in the metrics; a domain with no others is then left out of them.
        support_from: another domain to take the support images from, by domain: a control.
        name: of a progress bar; None: no bar.

    Raises:
        UserError: support images are not scored and no domain has any others.
    """
    predictions = torch.zeros(len(split), dtype=torch.float32 if task.kind == "regression" else torch.int64)
    scored: list[Tensor] = []
    domains: dict[int, Mapping[str, float]] = {}
    for domain, members in progress_over(split.members.items(), name=name, unit="domain"):
        support = split.members[support_from[domain]] if support_from else members
        student = method.adapt(split.images(support[:support_size]))
        for index in members.split(batch_size):
            predictions[index] = task.predictions(student.logits(split.images(index))).cpu().to(predictions.dtype)
        counted = members if score_support else members[support_size:]
        if len(counted):
            scored.append(counted)
            domains[domain] = task.metrics(predictions[counted], split.labels[counted])
    if not scored:
        raise UserError(f"evaluation.support_size: no domain has more than {support_size} images, and none is left to score")
    together = torch.cat(scored)
    return Evaluation(task, task.metrics(predictions[together], split.labels[together]), domains, predictions)


def table(names: Sequence[str], evaluations: Sequence[Evaluation], domain_names: Mapping[int, str]) -> str:
    """Per-domain selection metrics in percent: a row a domain, a column a method, mean and worst domain last."""
    rows = [["domain", *names]]
    for domain in evaluations[0].domains:
        metric = evaluations[0].task.selection_metric
        rows.append([domain_names.get(domain, str(domain)), *(f"{100 * e.domains[domain][metric]:.1f}" for e in evaluations)])
    summary = [
        ["mean", *(f"{100 * e.mean:.1f}" for e in evaluations)],
        ["worst domain", *(f"{100 * e.worst:.1f}" for e in evaluations)],
    ]
    widths = [max(len(row[i]) for row in rows + summary) for i in range(len(rows[0]))]
    rule = "  ".join("-" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])

    return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), rule, *map(line, summary)])
