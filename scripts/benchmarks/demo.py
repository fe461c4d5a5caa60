"""The learning steps of ``make demo`` beyond plain supervised training, its way and the published way.

A step here is a part of both stages, in the proportion that the demo's configuration has them: so many steps of aggregator
pretraining, so many of meta-training, with everything that belongs to them: drawing and rendering the images included.
"""

import math
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.config import CONFIG_FOLDER, Config, Duration, load_config
from dmoe.data.episodes import EpisodeSampler
from dmoe.data.partition import partition
from dmoe.data.registry import load_dataset
from dmoe.data.streams import EpochOrder
from dmoe.machine import keep_freed_memory
from dmoe.meta.training import meta_train
from dmoe.meta_stage import gradient_way, meta_learner
from dmoe.model import build_aggregator
from dmoe.models.expert_pool import ExpertPool, without_own_expert
from dmoe.models.networks import in_layout
from dmoe.run import Run
from dmoe.run_folder import RunFolder, Stage
from dmoe.supervised import task_loss, train_supervised
from dmoe.tokens import build_store
from scripts.benchmarks import published as plain
from scripts.benchmarks.measuring import Make, Place, Step

IMAGES_PER_DOMAIN = 300
"""Source images of each domain that the benchmark draws from; the cost of a step does not depend on it."""

NEVER = 10**9


def steps_of(config: Config, share: float) -> tuple[int, int]:
    """Steps of aggregator pretraining and of meta-training: ``share`` of the demo's, at least one of each, in its proportion."""
    whole = [stage.duration.steps(1) for stage in (config.aggregator.training, config.meta)]
    common = math.gcd(*whole)
    times = max(1, round(share * common))
    return whole[0] // common * times, whole[1] // common * times


class Demo:
    """A run of the demo with fresh networks; what both sides start from is the same."""

    def __init__(self, place: Place, *, share: float) -> None:
        config = load_config(CONFIG_FOLDER / "digits.yaml")
        dataset = load_dataset("digits", config.data).with_fewer_source_images(IMAGES_PER_DOMAIN)
        domains = dataset.splits["source"].group_domains.unique().tolist()
        groups = partition(domains, count=config.experts.count, seed=config.seed, how=config.experts.partition)
        self.run = Run(config=config, folder=RunFolder(Path("runs/benchmark")), dataset=dataset, groups=groups, device=place.at)
        count = config.experts.count
        self.experts = [self.run.network(config.token_backbone, number, to_train=True).eval() for number in range(count)]
        self.student = self.run.network(config.student_backbone, "student", to_train=True).eval()
        outputs = dataset.task.num_outputs
        self.aggregator = build_aggregator(config.aggregator, width=self.student.width, num_outputs=outputs).to(place.at)
        self.aggregator_steps, self.meta_steps = steps_of(config, share)
        self.order = EpochOrder(len(self.run.source), config.aggregator.training.batch_size, "benchmark")


def ours(*, share: float) -> Make:
    return partial(_ours, share)


def published(*, share: float) -> Make:
    return partial(_published, share)


def _ours(share: float, place: Place) -> Step:
    keep_freed_memory()
    return our_steps(Demo(place, share=share))


def _published(share: float, place: Place) -> Step:
    return published_steps(Demo(place, share=share))


def our_steps(demo: Demo) -> Step:
    """The two stages as a run has them, checkpoints and all, for so few steps, without looks at the validation domains."""
    run = demo.run
    config, source = run.config, run.source
    with tempfile.TemporaryDirectory() as folder:
        tokens = build_store(
            Stage(Path(folder) / "tokens", {}),
            split=source,
            pool=ExpertPool(expert.features for expert in demo.experts).to(run.device),
            width=demo.student.width,
            batch_size=config.tokens.batch_size,
            device=run.device,
        )
        tokens[torch.zeros(1, dtype=torch.int64)]  # the mapping outlives the file's name

    learner = meta_learner(run, demo.aggregator, demo.student)
    learner.way = gradient_way(run, learner).way

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = demo.order[step]
        return tokens[index], source.labels[index]

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            train_supervised(
                stage=Stage(Path(folder) / "aggregator", {}),
                module=demo.aggregator,
                loss=task_loss(demo.aggregator.logits, run.dataset.task, precision="float32", device=run.device),
                batch=batch,
                steps_per_epoch=demo.order.steps_per_epoch,
                training=config.aggregator.training.model_copy(update={"duration": Duration(demo.aggregator_steps, "steps")}),
                evaluate=None,
                checkpoint_every=NEVER,
                seed=0,
                device=run.device,
            )
            meta_train(
                stage=Stage(Path(folder) / "meta", {}),
                learner=learner,
                split=source,
                tokens=tokens,
                own_expert=run.own_expert,
                config=config.meta.model_copy(update={"duration": Duration(demo.meta_steps, "steps")}),
                evaluate=lambda: 0.0,
                checkpoint_every=NEVER,
                seed=0,
                device=run.device,
            )

    return step


def published_steps(demo: Demo) -> Step:
    """The same steps on the same images: each image drawn again where it is needed, and all experts over it."""
    run = demo.run
    meta, source, device = run.config.meta, run.source, run.device
    sampler = EpisodeSampler(source, support_size=meta.support_size, query_size=meta.query_size, key=(0, "episode"))
    teacher = demo.aggregator
    student, *experts = (in_layout(network, torch.contiguous_format) for network in (demo.student, *demo.experts))

    def pretrain() -> None:
        adam = torch.optim.Adam(teacher.parameters(), lr=run.config.aggregator.training.optimizer.lr)
        teacher.train()
        for number in range(demo.aggregator_steps):
            index = demo.order[number]
            images, labels = source.images(index).to(device), source.labels[index].to(device)
            F.cross_entropy(teacher.logits(plain.live_tokens(experts, images)), labels).backward()
            adam.step()
            adam.zero_grad()

    def meta_training() -> None:
        teacher.eval()
        adam_s = torch.optim.Adam(student.parameters(), lr=meta.student.lr)
        adam_t = torch.optim.Adam(teacher.parameters(), lr=meta.aggregator.lr)
        for number in range(demo.meta_steps):
            for slot in range(meta.domains_per_update):
                episode = sampler(number, slot)
                support = source.images(episode.support).to(device)
                query = source.images(episode.query, draw=episode.draw).to(device)
                tokens = without_own_expert(plain.live_tokens(experts, support), run.own_expert[episode.support].to(device))
                plain.add_meta_gradients(
                    student,
                    teacher,
                    tokens,
                    support,
                    query,
                    source.labels[episode.query].to(device),
                    inner_lr=meta.inner_lr,
                    inner_steps=meta.inner_steps,
                    share=1 / meta.domains_per_update,
                )
            for adam in (adam_s, adam_t):
                adam.step()
                adam.zero_grad()

    def step() -> None:
        pretrain()
        meta_training()

    return step
