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
from dmoe.distributed import ALONE, World
from dmoe.errors import UserError
from dmoe.loop import Progress, Trainee, run
from dmoe.memory import is_out_of_memory
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way
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
    way_changed: Callable[[Way], None] = lambda way: None,
    world: World = ALONE,
) -> Progress:
    """Meta-train ``learner`` on episodes of the source split; it ends with the weights that scored best.

    Support images come in a stored view, which their tokens are of, drawn at random where there are several; query images are
    freshly augmented.

    Args:
        tokens: of the split's stored views, all N.
        own_expert: ``[n]``, the expert whose group holds each image's domain.
        evaluate: the score on validation domains, after adapting; higher is better.
        world: the processes that share the episodes of every update.
        way_changed: told where memory made the learner go another way.
    """
    sampler = EpisodeSampler(split, support_size=config.support_size, query_size=config.query_size, key=(seed, "episode"))
    if sampler.skipped:
        say(f"{stage.name}: {len(sampler.skipped)} source domains have too few images for an episode and are never drawn")
    per_update = config.domains_per_update
    if world.size > per_update:
        idle = world.size - per_update
        say(f"{stage.name}: {idle} of {world.size} processes have no episode: meta.domains_per_update is {per_update}")
    steps_per_epoch = max(1, len(split) // (per_update * (config.support_size + config.query_size)))
    steps = config.duration.steps(steps_per_epoch)

    def tensors(episode: Episode) -> EpisodeBatch:
        view = random_views(len(episode.support), tokens.views, episode.draw, "support")
        stored = tokens.of_views(episode.support, view)
        masked = without_own_expert(stored, own_expert[episode.support], mask=config.mask)
        query = split.pixels(episode.query, draw=episode.draw)
        return EpisodeBatch(split.pixels(episode.support, view=view), masked, query, split.labels[episode.query])

    def update(number: int) -> list[EpisodeBatch]:
        return [tensors(sampler(number, slot)) for slot in world.share(range(per_update))]

    learning = {
        "student": (learner.student_parameters, config.student),
        "aggregator": (learner.aggregator_parameters, config.aggregator),
    }
    optimizers = {
        name: ScheduledAdam(parameters, settings, steps=steps, steps_per_epoch=steps_per_epoch)
        for name, (parameters, settings) in learning.items()
        if parameters
    }
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
        values = gradients_that_fit(learner, episodes, of=per_update, changed=way_changed)
        values = learner.add_up_gradients(values, world)
        return learner.apply(number, values, optimizers.get("student"), optimizers.get("aggregator"))

    def describe(number: int) -> str:
        episodes = [sampler(number, slot) for slot in range(per_update)]
        return "; ".join(split.describe(torch.cat([e.support, e.query])) for e in episodes)

    return run(
        stage=stage,
        trainee=Trainee(modules={"student": learner.student, "aggregator": learner.aggregator}, optimizers=optimizers),
        step=step,
        steps=steps,
        start=start,
        evaluate=evaluate,
        evaluate_every=config.evaluate_every.steps(steps_per_epoch),
        checkpoint_every=checkpoint_every,
        describe=describe,
        world=world,
    )


def gradients_that_fit(
    learner: MetaLearner, episodes: Sequence[EpisodeBatch], *, of: int | None = None, changed: Callable[[Way], None]
) -> dict[str, float]:
    """:meth:`MetaLearner.add_gradients`, with half as many images at a time wherever memory does not suffice.

    Args:
        of: see there.
        changed: told the learner's new way, which is kept.

    Raises:
        UserError: not even one image at a time fits.
    """
    images = max((max(len(episode.support), len(episode.query)) for episode in episodes), default=1)
    while True:
        try:
            return learner.add_gradients(episodes, of=of)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, where the traceback no longer holds on to the tensors.
        learner.clear_gradients()
        smaller = learner.way.smaller(images)
        if smaller is None:
            raise UserError("meta: memory does not suffice for one image at a time: take smaller images or a smaller student")
        learner.way = smaller
        changed(smaller)
