"""Our way: stored tokens, gradients in chunks or whole, the parts of the package as a run puts them together."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.adaptation import Adapter
from dmoe.config import OptimizerConfig
from dmoe.data.base import DomainSplit
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way
from dmoe.models.expert_pool import ExpertPool, without_own_expert
from dmoe.models.networks import Network, in_layout
from dmoe.optimizers import ScheduledAdam
from dmoe.precision import computing_in
from dmoe.run_folder import Stage
from dmoe.tokens import build_store
from scripts.benchmarks.inputs import CLASSES, INNER_LR, LR, TASK, Episode, as_delivered, new_aggregator
from scripts.benchmarks.measuring import Step


def meta_step(episode: Episode, *, way: Way) -> Step:
    """One meta-training step by one of our ways to the gradient."""
    learner = MetaLearner(
        student=episode.student,
        aggregator=episode.teacher,
        task=TASK,
        inner_lr=INNER_LR,
        inner_steps=episode.setting.inner_steps,
        way=way,
        precision=episode.precision,
    )
    adams = [scheduled(parameters) for parameters in (learner.student_parameters, learner.aggregator_parameters)]
    support, query = as_delivered(episode.x_support), as_delivered(episode.x_query)
    del episode.x_support, episode.x_query

    def step() -> None:
        masked = without_own_expert(episode.tokens, episode.own)
        learner.update(0, [EpisodeBatch(support, masked, query, episode.labels)], *adams)

    return step


def aggregator_step(episode: Episode) -> Step:
    """One step of aggregator pretraining, from stored tokens."""
    teacher = new_aggregator(episode.student.width, episode.device, episode.dtype).train()
    labels = torch.randint(CLASSES, (episode.setting.support,), device=episode.device)
    adam = scheduled(teacher.parameters())

    def step() -> None:
        with computing_in(episode.precision, episode.device):
            loss = F.cross_entropy(teacher.logits(episode.tokens), labels)
        loss.backward()
        adam.step(0)

    return step


def adaptation(episode: Episode) -> Step:
    """From unlabeled images to an adapted student."""
    made, images = adapter(episode), as_delivered(episode.x_support)
    return lambda: made.adapt(images)


def adaptations(episode: Episode, *, domains: int, together: bool) -> Step:
    """Students for several domains, in one pass or one after the other."""
    made = adapter(episode)
    images = torch.stack([as_delivered(episode.images(episode.setting.support)) for _ in range(domains)])
    return lambda: made.adapt_many(images) if together else [made.adapt(part) for part in images]


def prediction(episode: Episode) -> Step:
    """What the adapted student says of the query images."""
    student, images = adapter(episode).adapt(as_delivered(episode.x_support)), as_delivered(episode.x_query)
    return lambda: student.predict(images)


def experts(episode: Episode) -> list[Network]:
    """Laid out in memory as a run has them."""
    return [in_layout(expert, torch.channels_last) for expert in episode.experts()]


def adapter(episode: Episode) -> Adapter:
    return Adapter(
        features=in_layout(episode.student, torch.channels_last).features,
        head=episode.student.head,
        experts=[expert.features for expert in experts(episode)],
        expert_precision=episode.precision,
        aggregator=episode.teacher,
        inner_lr=INNER_LR,
        inner_steps=episode.setting.inner_steps,
        task=TASK,
    )


class InMemory(DomainSplit):
    """Random images that are there already, of one domain."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.labels = self.domains = self.group_domains = torch.zeros(len(images), dtype=torch.int64)
        self.domain_names = {0: "noise"}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self._images[index]


def token_store(episode: Episode, *, batch_size: int) -> Step:
    """The tokens of the support images, written to disk by the stage that a run has for it."""
    pool = ExpertPool((expert.features for expert in experts(episode)), precision=episode.precision)
    split = InMemory(as_delivered(episode.x_support).cpu())

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_store(
                Stage(Path(folder) / "tokens", {}),
                split=split,
                pool=pool,
                width=episode.student.width,
                batch_size=batch_size,
                device=episode.device,
            )

    return step


def scheduled(parameters: Iterable[Tensor]) -> ScheduledAdam:
    return ScheduledAdam(parameters, OptimizerConfig(lr=LR), steps=1, steps_per_epoch=1)
