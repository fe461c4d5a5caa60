"""Features whose means and covariances are alike in all domains."""

from torch import Tensor

from dmoe.objectives.base import Objective, Outputs, mean_over_pairs
from dmoe.tasks import Task


class CORAL(Objective):
    """The task loss, and how far means and covariances of the features differ between domains.

    Source: Sun & Saenko, *Deep CORAL*, ECCV 2016, eq. 1; between all pairs of source domains, and with means, as Gulrajani &
    Lopez-Paz, *In search of lost domain generalization*, ICLR 2021.
    """

    def __init__(self, task: Task, *, penalty: float) -> None:
        """
        Args:
            penalty: weight of the differences (DomainBed: 1, or 0.1 to 10).
        """
        self._task, self._penalty = task, penalty

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        return self._task.loss(batch.logits, batch.labels) + self._penalty * coral_penalty(batch)


def coral_penalty(batch: Outputs) -> Tensor:
    """Squared differences of means, averaged over D, and of covariances, averaged over D x D; averaged over pairs of domains."""
    moments = [_moments(part.features) for part in batch.by_domain()]
    return mean_over_pairs(moments, _difference, none=batch.features.new_zeros(()))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and covariance ``[D, D]``; that of a single image is zero."""
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / max(1, len(features) - 1)


def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Of two means and covariances, squared."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    return (mean - other_mean).square().mean() + (covariance - other_covariance).square().mean()
