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
from dmoe.meta.learner import MetaLearner, Way
from dmoe.meta.training import meta_train
from dmoe.model import build_aggregator
from dmoe.models.expert_pool import ExpertPool, without_own_expert
from dmoe.models.networks import Network, build_network
from dmoe.run_folder import Stage
from dmoe.supervised import train_supervised
from dmoe.tokens import build_store
from scripts.benchmarks import published as plain
from scripts.benchmarks.measuring import Make, Step

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
    """Fresh networks on the demo's data; what both sides start from is the same."""

    def __init__(self, device: torch.device, *, share: float) -> None:
        self.device = device
        self.config = load_config(CONFIG_FOLDER / "digits.yaml")
        self.dataset = load_dataset("digits", self.config.data).with_fewer_source_images(IMAGES_PER_DOMAIN)
        self.source = self.dataset.splits["source"]
        groups = partition(
            self.source.group_domains.unique().tolist(),
            count=self.config.experts.count,
            seed=self.config.seed,
            how=self.config.experts.partition,
        )
        self.own = torch.tensor([groups[domain] for domain in self.source.group_domains.tolist()])
        torch.manual_seed(0)
        self.experts = [self._network() for _ in range(self.config.experts.count)]
        self.student = self._network()
        outputs = self.dataset.task.num_outputs
        self.aggregator = build_aggregator(self.config.aggregator, width=self.student.width, num_outputs=outputs).to(device)
        self.aggregator_steps, self.meta_steps = steps_of(self.config, share)
        self.order = EpochOrder(len(self.source), self.config.aggregator.training.batch_size, "benchmark")

    def _network(self) -> Network:
        name, outputs = self.config.student_backbone.name, self.dataset.task.num_outputs
        return build_network(name, image_shape=self.dataset.image_shape, num_outputs=outputs).eval().to(self.device)


def ours(*, share: float) -> Make:
    return partial(_ours, share)


def published(*, share: float) -> Make:
    return partial(_published, share)


def _ours(share: float, device: torch.device) -> Step:
    keep_freed_memory()
    return our_steps(Demo(device, share=share))


def _published(share: float, device: torch.device) -> Step:
    return published_steps(Demo(device, share=share))


def our_steps(demo: Demo) -> Step:
    """The two stages as a run has them, checkpoints and all, for so few steps, without looks at the validation domains."""
    config, source = demo.config, demo.source
    with tempfile.TemporaryDirectory() as folder:
        tokens = build_store(
            Stage(Path(folder) / "tokens", {}),
            split=source,
            pool=ExpertPool(expert.features for expert in demo.experts).to(demo.device),
            width=demo.student.width,
            batch_size=config.tokens.batch_size,
            device=demo.device,
        )
        tokens[torch.zeros(1, dtype=torch.int64)]  # the mapping outlives the file's name

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = demo.order[step]
        return tokens[index], source.labels[index]

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            train_supervised(
                stage=Stage(Path(folder) / "aggregator", {}),
                module=demo.aggregator,
                logits=demo.aggregator.logits,
                batch=batch,
                steps_per_epoch=demo.order.steps_per_epoch,
                task=demo.dataset.task,
                training=config.aggregator.training.model_copy(update={"duration": Duration(demo.aggregator_steps, "steps")}),
                evaluate=None,
                checkpoint_every=NEVER,
                seed=0,
                device=demo.device,
            )
            meta_train(
                stage=Stage(Path(folder) / "meta", {}),
                learner=MetaLearner(
                    student=demo.student,
                    aggregator=demo.aggregator,
                    task=demo.dataset.task,
                    inner_lr=config.meta.inner_lr,
                    inner_steps=config.meta.inner_steps,
                    inner_loss=config.meta.inner_loss,
                    way=Way("double_backward"),  # as the configuration has it
                ),
                split=source,
                tokens=tokens,
                own_expert=demo.own,
                config=config.meta.model_copy(update={"duration": Duration(demo.meta_steps, "steps")}),
                evaluate=lambda: 0.0,
                checkpoint_every=NEVER,
                seed=0,
                device=demo.device,
            )

    return step


def published_steps(demo: Demo) -> Step:
    """The same steps on the same images: each image drawn again where it is needed, and all experts over it."""
    meta, source, device = demo.config.meta, demo.source, demo.device
    sampler = EpisodeSampler(source, support_size=meta.support_size, query_size=meta.query_size, key=(0, "episode"))
    student, teacher = demo.student, demo.aggregator

    def pretrain() -> None:
        adam = torch.optim.Adam(teacher.parameters(), lr=demo.config.aggregator.training.optimizer.lr)
        teacher.train()
        for number in range(demo.aggregator_steps):
            index = demo.order[number]
            images, labels = source.images(index).to(device), source.labels[index].to(device)
            F.cross_entropy(teacher.logits(plain.live_tokens(demo.experts, images)), labels).backward()
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
                tokens = without_own_expert(plain.live_tokens(demo.experts, support), demo.own[episode.support].to(device))
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
