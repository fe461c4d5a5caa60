"""A small run on random images, for tests of what is decided before and between its stages."""

from pathlib import Path

import torch
from torch import Tensor

from dmoe.config import CONFIG_FOLDER, load_config
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.run_folder import RunFolder
from dmoe.stages import Run
from dmoe.tasks import Task, TaskKind

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
