"""Stage 5: bi-level training of student and aggregator in episodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmoe.config import MetaConfig
from dmoe.console import say
from dmoe.data.base import DomainSplit
from dmoe.data.episodes import Episode, EpisodeSampler
from dmoe.data.streams import stream
from dmoe.data.transforms import random_views
from dmoe.loop import Progress, Trainee, run
from dmoe.meta.learner import EpisodeBatch, MetaLearner
from dmoe.models.expert_pool import without_own_expert
from dmoe.optimizers import ScheduledAdam
from dmoe.run_folder import Stage
from dmoe.tokens import TokenStore


def meta_train(
    *,
    stage: Stage,
    learner: MetaLearner,
    split: DomainSplit,
    tokens: TokenStore,
    own_expert: Tensor,
    config: MetaConfig,
    evaluate: Callable[[], float],
    checkpoint_every: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
) -> Progress:
    """Meta-train ``learner`` on episodes of the source split; it ends with the weights that scored best.

    Support images come in a stored view, which their tokens are of, drawn at random where there are several; query images are
    freshly augmented.

    Args:
        tokens: of the split's stored views, all N.
        own_expert: ``[n]``, the expert whose group holds each image's domain.
        evaluate: the score on validation domains, after adapting; higher is better.
    """
    sampler = EpisodeSampler(split, support_size=config.support_size, query_size=config.query_size, key=(seed, "episode"))
    if sampler.skipped:
        say(f"{stage.name}: {len(sampler.skipped)} source domains have too few images for an episode and are never drawn")
    per_update = config.domains_per_update
    steps_per_epoch = max(1, len(split) // (per_update * (config.support_size + config.query_size)))
    steps = config.duration.steps(steps_per_epoch)

    def tensors(episode: Episode) -> EpisodeBatch:
        view = random_views(len(episode.support), tokens.views, episode.draw, "support")
        stored = tokens.of_views(episode.support, view)
        masked = without_own_expert(stored, own_expert[episode.support], mask=config.mask)
        query = split.pixels(episode.query, draw=episode.draw)
        return EpisodeBatch(split.pixels(episode.support, view=view), masked, query, split.labels[episode.query])

    def update(number: int) -> list[EpisodeBatch]:
        return [tensors(sampler(number, slot)) for slot in range(per_update)]

    student_adam = ScheduledAdam(learner.student_parameters, config.student, steps=steps, steps_per_epoch=steps_per_epoch)
    optimizers = {"student": student_adam}
    aggregator_adam = None
    if learner.aggregator_parameters:
        aggregator_adam = ScheduledAdam(
            learner.aggregator_parameters, config.aggregator, steps=steps, steps_per_epoch=steps_per_epoch
        )
        optimizers["aggregator"] = aggregator_adam
    batches: Iterator[Sequence[EpisodeBatch]] = iter(())

    def start(first: int) -> None:
        nonlocal batches
        batches = stream(update, start=first, stop=steps, workers=workers)

    def step(number: int) -> dict[str, float]:
        if config.restart_optimizers and number % steps_per_epoch == 0:
            for optimizer in optimizers.values():
                optimizer.restart()
        here = [episode.to(device) for episode in next(batches)]
        episodes = [replace(e, support=split.finish(e.support), query=split.finish(e.query)) for e in here]
        return learner.update(number, episodes, student_adam, aggregator_adam)

    return run(
        stage=stage,
        trainee=Trainee(modules={"student": learner.student, "aggregator": learner.aggregator}, optimizers=optimizers),
        step=step,
        steps=steps,
        start=start,
        evaluate=evaluate,
        evaluate_every=config.evaluate_every.steps(steps_per_epoch),
        checkpoint_every=checkpoint_every,
    )
