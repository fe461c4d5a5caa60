"""The one training of all three ways of ARM: in episodes, through adapting.

Source: Zhang et al., *Adaptive risk minimization*, NeurIPS 2021, algorithm 1. There the images that are adapted to are those that
are then predicted; here they are others of the same domain, as in testing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dmoe.baselines.arm import Arm
from dmoe.config import TrainingConfig
from dmoe.data.base import DomainSplit
from dmoe.data.episodes import Episode, EpisodeSampler
from dmoe.errors import UserError
from dmoe.loop import Progress
from dmoe.precision import computing_in, not_coarse
from dmoe.randomness import Key
from dmoe.run_folder import Stage
from dmoe.supervised import train_supervised
from dmoe.tasks import Task


class EpisodeBatches:
    """The images of a few episodes of a split, all freshly augmented, by step.

    Attributes:
        steps_per_epoch: of as many images as there are to choose from.
    """

    def __init__(self, split: DomainSplit, *, episodes: int, support_size: int, query_size: int, key: tuple[Key, ...]) -> None:
        """
        Raises:
            UserError: no domain is large enough.
        """
        self._split, self._episodes = split, episodes
        self._sampler = EpisodeSampler(split, support_size=support_size, query_size=query_size, key=key)
        self.steps_per_epoch = max(1, len(split) // (episodes * (support_size + query_size)))

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels of G x S support and R query images, for the split's ``finish``; labels of these, and how many an episode has."""
        episodes = self._drawn(step)
        support, query = torch.cat([e.support for e in episodes]), torch.cat([e.query for e in episodes])
        pixels = self._split.pixels(torch.cat([support, query]), draw=episodes[0].draw)
        sizes = torch.tensor([len(e.query) for e in episodes])
        return pixels[: len(support)], pixels[len(support) :], self._split.labels[query], sizes

    def index(self, step: int) -> Tensor:
        """Numbers of all images of a step."""
        return torch.cat([part for e in self._drawn(step) for part in (e.support, e.query)])

    def _drawn(self, step: int) -> list[Episode]:
        return [self._sampler(step, slot) for slot in range(self._episodes)]


def train_in_episodes(
    *,
    stage: Stage,
    arm: Arm,
    split: DomainSplit,
    task: Task,
    training: TrainingConfig,
    support_size: int,
    domains: int,
    evaluate: Callable[[], float],
    checkpoint_every: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
) -> Progress:
    """Train ``arm`` to predict well after adapting; it ends with the weights that scored best.

    Args:
        training: its ``batch_size`` is that of the query images of a step, which are shared out to its episodes.
        support_size: images to adapt to, of each episode.
        domains: episodes in a step.
        evaluate: the score after adapting; higher is better.

    Raises:
        UserError: there are fewer query images than episodes, or no domain is large enough.
    """
    if training.batch_size < domains:
        raise UserError(f"batch_size: must be at least {domains}, an image to query for each episode, got {training.batch_size}")
    batches = EpisodeBatches(
        split, episodes=domains, support_size=support_size, query_size=training.batch_size // domains, key=(seed, "arm")
    )

    def loss(step: int, support: Tensor, query: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        with computing_in(training.precision, device):
            unlabeled = split.finish(support).unflatten(0, (domains, support_size))
            logits = arm.query_logits(unlabeled, split.finish(query).split(sizes.tolist()))
        return task.loss(not_coarse(logits), labels)

    return train_supervised(
        stage=stage,
        module=arm,
        loss=loss,
        batch=batches,
        steps_per_epoch=batches.steps_per_epoch,
        training=training,
        evaluate=evaluate,
        checkpoint_every=checkpoint_every,
        seed=seed,
        device=device,
        workers=workers,
        describe=lambda step: split.describe(batches.index(step)),
    )
