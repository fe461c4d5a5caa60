"""A small run on random images, for tests of what is decided before and between its stages."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dmoe import stages
from dmoe.config import CONFIG_FOLDER, load_config
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.meta_stage import meta_train_student
from dmoe.run import Run
from dmoe.run_folder import RunFolder
from dmoe.tasks import Task, TaskKind
from experts.training import train_expert

SETTINGS = [
    "experts.count=2",
    "experts.training.batch_size=10",
    "experts.training.duration=3 epochs",
    "experts.training.evaluate_every=1 epochs",
    "aggregator.training.batch_size=20",
    "aggregator.training.duration=2 epochs",
    "aggregator.training.evaluate_every=1 epochs",
    "student.training.batch_size=25",
    "student.training.duration=7 steps",
    "student.training.evaluate_every=3 steps",
    "meta.duration=2 epochs",
    "meta.evaluate_every=0.5 epochs",
    "meta.domains_per_update=2",
    "meta.support_size=8",
    "meta.query_size=7",
]
GROUPS = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1}
"""The first expert has 60 of the 100 source images, the second 40."""


class Noise(DomainSplit):
    """So many images of 4x4 pixels, dealt out to the domains in turn."""

    def __init__(self, count: int, *, first: int, domains: int, kind: TaskKind, views: int = 1) -> None:
        number = torch.arange(count)
        self.labels = number / count if kind == "regression" else number % 2
        self.domains = self.group_domains = first + number % domains
        self.domain_names = {domain: f"domain {domain}" for domain in range(first, first + domains)}
        self.views = views

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return torch.rand(len(index), 1, 4, 4)


def run_in(folder: Path, *overrides: str, kind: TaskKind = "multiclass", views: int = 1) -> Run:
    """100 source images of 5 domains, 30 validation images of 3, 50 target images of 5."""
    splits: dict[str, DomainSplit] = {
        "source": Noise(100, first=0, domains=5, kind=kind, views=views),
        "validation": Noise(30, first=10, domains=3, kind=kind),
        "target": Noise(50, first=20, domains=5, kind=kind),
    }
    outputs = 3 if kind == "multiclass" else 1
    dataset = DomainDataset("noise", splits, Task(kind, outputs), ImageTransform((1, 4, 4)), class_names=(), fingerprint="n")
    config = load_config(CONFIG_FOLDER / "digits.yaml", [*SETTINGS, *overrides])
    return Run(config=config, folder=RunFolder(folder), dataset=dataset, groups=GROUPS, device=torch.device("cpu"))


class Steady(Noise):
    """The same images each time."""

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        every = torch.rand(len(self), 1, 4, 4, generator=torch.Generator().manual_seed(3))
        return every[index] + 0.1 * self.domains[index].view(-1, 1, 1, 1)


def steady_run_in(folder: Path, *overrides: str, kind: TaskKind = "multiclass") -> Run:
    """The same with images that stay."""
    run = run_in(folder, *overrides, kind=kind)
    steady: dict[str, DomainSplit] = {
        name: Steady(len(split), first=int(split.domains.min()), domains=len(split.domain_names), kind=kind)
        for name, split in run.dataset.splits.items()
    }
    return replace(run, dataset=replace(run.dataset, splits=steady))


def train(run: Run) -> None:
    """All stages up to meta-training."""
    run.folder.claim(run.config)
    for number in range(run.config.experts.count):
        train_expert(run, number)
    experts = stages.load_experts(run)
    tokens = stages.make_tokens(run, experts)
    aggregator = stages.pretrain_aggregator(run, tokens, experts[0].width)
    meta_train_student(run, tokens, experts, aggregator, stages.pretrain_student(run))
