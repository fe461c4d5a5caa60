"""What a run is about to do, on one screen: the data, the networks, the disk it needs, and about how long each stage takes."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dmoe.config import Duration, TrainingConfig
from dmoe.console import say
from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.meta.learner import EpisodeBatch
from dmoe.meta_stage import gradient_way, meta_learner
from dmoe.model import build_aggregator
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network
from dmoe.objectives import NAMES
from dmoe.randomness import generator
from dmoe.run import Run
from dmoe.tokens import TOKENS, bytes_a_number
from dmoe.watch_stage import batches_of

SECONDS_A_MEASUREMENT = 0.3
"""About how long each timed batch takes; batches are made as small or as large as that asks for."""

PATIENCE = 5.0
"""A single image that takes longer is not timed again."""


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on this machine just now.

    Attributes:
        read: an image, by all processes that read.
        forward: an image through one network.
        train: an image forward and backward through one network.
        aggregate: a step of the aggregator's pretraining.
        meta: an image of an episode through a meta-training step.
    """

    read: float
    forward: float
    train: float
    aggregate: float = 0.0
    meta: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One stage: what it does and about how many seconds that takes; 0 where it is finished."""

    stage: str
    work: str
    seconds: float


def show(run: Run) -> None:
    """Print the plan.

    Raises:
        UserError: the token store does not fit on the disk.
    """
    if run.config.trains_one:
        _show_alone(run)
        return
    expert = run.network(run.config.experts.backbone, "plan", to_train=False)
    student = run.network(run.config.student_backbone, "plan", to_train=False)
    outputs = run.dataset.task.num_outputs
    aggregator = build_aggregator(run.config.aggregator, width=expert.width, num_outputs=outputs).to(run.device)

    _show_data(run)
    count, backbone = run.config.experts.count, run.config.experts.backbone.name
    student_name = run.config.student_backbone.name
    say(
        f"  {count} experts {backbone}, {_millions(expert)} parameters each; aggregator {_millions(aggregator)}; "
        f"student {student_name}, {_millions(student)}; features {expert.width} wide"
    )
    _show_decoded(run)
    needed, free = token_bytes(run, width=expert.width), _free(run.folder.path)
    there = (run.folder.path / "tokens" / "source" / TOKENS).exists()
    say(f"  tokens take {_size(needed)}{' (already there)' if there else ''}; {_size(free)} are free on that disk")
    if needed > free and not there:
        raise UserError(
            f"{run.folder.path}: the tokens need {_size(needed)}, the disk has {_size(free)} left: choose another --run_dir"
            + (", or tokens.views=first" if run.source.views > 1 else "")
            + (", or tokens.storage=float16" if run.config.tokens.storage == "float32" else "")
        )
    if (run.folder.path / "meta" / "manifest.json").exists():
        say("  every stage is finished\n")
        return
    costs = measure(run, expert, student, aggregator)
    say(f"  meta-gradients by {gradient_way(run, meta_learner(run, aggregator, student))}")
    _show_entries(entries(run, costs))


def _show_alone(run: Run) -> None:
    network = run.network(run.config.student_backbone, "plan", to_train=False)
    _show_data(run)
    what = f"{run.config.student_backbone.name}, {_millions(network)} parameters, features {network.width} wide"
    say(f"  one network {what}; trained by {NAMES[run.config.student.objective.name]}, tested unadapted")
    _show_decoded(run)
    if run.student_stage.manifest.exists():
        say("  every stage is finished\n")
        return
    _show_entries(entries_alone(run, measure_network(run, network)))


def _show_data(run: Run) -> None:
    preset = f", preset {run.config.preset}" if run.config.preset else ""
    reading = f", {run.workers} processes reading" if run.workers else ""
    threads = f"{torch.get_num_threads()} CPU threads"
    say(f"{run.dataset.name}{preset}, seed {run.config.seed}, on {run.device} with {threads}{reading}; {run.folder.path}")
    for name, split in run.dataset.splits.items():
        say(f"  {name:<14}{len(split):>9,} images  {len(split.members):>5,} domains{_groups(run, name, split)}")


def _show_decoded(run: Run) -> None:
    if run.dataset.decoded is not None:
        decoded = run.dataset.decoded
        most, kept = _size(decoded.bytes_at_most), _size(decoded.bytes_there)
        say(f"  decoded images are kept in {decoded.path.parent}, up to {most}; {kept} are there (data.decoded_gb)")


def _show_entries(plan: Sequence[Entry]) -> None:
    for entry in plan:
        say(f"  {entry.stage:<14}{entry.work:<58}{_duration(entry.seconds) if entry.seconds else 'finished':>12}")
    say(f"  {'in all, about':<72}{_duration(sum(entry.seconds for entry in plan)):>12}\n")


def token_bytes(run: Run, *, width: int) -> int:
    """Size of the token stores."""
    views = {"source": run.source.views if run.config.tokens.views == "all" else 1, "validation": 1}
    images = sum(len(run.dataset.splits[name]) * count for name, count in views.items())
    return images * run.config.experts.count * width * bytes_a_number(run.config.tokens.storage)


def measure(run: Run, expert: Network, student: Network, aggregator: Aggregator) -> Costs:
    """Time a few batches of each kind of work. Nothing of the run is changed."""
    task, device = run.dataset.task, run.device
    images, labels = _some_images(run)

    def aggregate(steps: int) -> None:
        for _ in range(steps):
            task.loss(aggregator.logits(tokens), many_labels).backward()

    def meta(count: int) -> None:
        learner.add_gradients([EpisodeBatch(images[:count], tokens[:1].expand(count, -1, -1), images[:count], labels[:count])])

    batch = run.config.aggregator.training.batch_size
    learner = meta_learner(run, aggregator, student)
    learner.way = gradient_way(run, learner).way
    tokens = torch.zeros(batch, run.config.experts.count, expert.width, device=device)
    many_labels = run.source.labels[torch.arange(batch) % len(run.source)].to(device)
    return replace(
        measure_network(run, expert),
        aggregate=_seconds_each(aggregate, at_most=8, wait=_wait(device)),
        meta=_seconds_each(meta, at_most=len(images), wait=_wait(device)) / 2,
    )


def measure_network(run: Run, network: Network) -> Costs:
    """The part of :func:`measure` that is of one network alone."""
    task, wait = run.dataset.task, _wait(run.device)
    index = _some_index(run)

    def read(count: int) -> None:
        run.source.images(index[:count], draw=0)

    reading = _seconds_each(read, at_most=len(index))
    images, labels = _some_images(run)

    def forward(count: int) -> None:
        with torch.no_grad():
            network.eval()(images[:count])

    def train(count: int) -> None:
        # In eval mode, where one image is enough for batch-norm.
        task.loss(network.eval()(images[:count]), labels[:count]).backward()

    return Costs(
        read=reading / max(1, run.workers),
        forward=_seconds_each(forward, at_most=len(images), wait=wait),
        train=_seconds_each(train, at_most=len(images), wait=wait),
    )


def _some_index(run: Run) -> Tensor:
    return torch.randperm(len(run.source), generator=generator("plan"))[:64]


def _some_images(run: Run) -> tuple[Tensor, Tensor]:
    images = run.source.images(_some_index(run)).to(run.device)
    return images, run.source.labels[: len(images)].to(run.device)


def _wait(device: torch.device) -> Callable[[], object] | None:
    return torch.cuda.synchronize if device.type == "cuda" else None


def entries(run: Run, costs: Costs) -> list[Entry]:
    """The stages of the run with their work and time; those that are loaded are as good as finished."""
    config, source, validation = run.config, run.source, run.validation
    experts = config.experts
    look = max(costs.read, costs.forward)  # a validation image
    members = [int((run.own_expert == number).sum()) for number in range(experts.count)]
    trained = "experts" not in run.given
    waiting = [size for number, size in enumerate(members) if trained and not run.expert_stage(number).manifest.exists()]
    machines = torch.cuda.device_count() if run.device.type == "cuda" else 1
    per_update = config.meta.domains_per_update
    episode = config.meta.support_size + config.meta.query_size
    epoch = max(1, len(source) // (per_update * episode))
    meta_steps, meta_checks = _steps(config.meta.duration, config.meta.evaluate_every, epoch)
    stored = len(source) * (source.views if config.tokens.views == "all" else 1) + len(validation)
    aggregating, checks = _training(config.aggregator.training, len(source))
    adapt = config.support_size * (experts.count * costs.forward + 2 * costs.train)
    target = run.dataset.splits["target"]
    watched = sum(len(batches_of(run.dataset.splits[name], size=config.support_size, key=())) for name in ("source", "validation"))

    def finished(name: str) -> bool:
        return name in run.given or (run.folder.path / name / "manifest.json").exists()

    def tested(split: DomainSplit) -> float:
        return len(split) * look + len(split.members) * adapt

    return [
        Entry(
            "experts",
            f"{len(waiting)} of {experts.count}, {experts.training.duration} of batches of {experts.training.batch_size}",
            sum(_supervised(run, costs, experts.training, size) for size in waiting) / max(1, min(machines, len(waiting))),
        ),
        Entry(
            "tokens",
            f"{stored:,} images through {experts.count} experts",
            0.0 if finished("tokens/source") else stored * max(costs.read, experts.count * costs.forward),
        ),
        Entry(
            "aggregator",
            f"{config.aggregator.training.duration} of batches of {config.aggregator.training.batch_size}, from tokens",
            0.0 if finished("aggregator") else (aggregating + checks) * costs.aggregate,
        ),
        _student(run, costs, finished=finished("student")),
        Entry(
            "meta",
            f"{meta_steps:,} updates of {per_update} x {config.meta.support_size} + {config.meta.query_size} images",
            0.0
            if finished("meta")
            else meta_steps * per_update * episode * max(costs.read, costs.meta) + meta_checks * tested(validation),
        ),
        Entry(
            "diagnosis",
            f"{watched} batches of {config.support_size} images adapted to, from tokens",
            0.0 if finished("diagnosis") else watched * config.support_size * max(costs.read, 2 * costs.train + costs.forward),
        ),
        Entry("test", f"{len(target):,} images of {len(target.members)} domains", 3 * len(target) * look + tested(target)),
    ]


def entries_alone(run: Run, costs: Costs) -> list[Entry]:
    """The stages of a run that trains one network alone."""
    target = run.dataset.splits["target"]
    test = Entry("test", f"{len(target):,} images of {len(target.members)} domains", len(target) * max(costs.read, costs.forward))
    return [_student(run, costs, finished=False), test]


def _student(run: Run, costs: Costs, *, finished: bool) -> Entry:
    training = run.config.student.training
    seconds = 0.0 if finished else _supervised(run, costs, training, len(run.source))
    return Entry("student", f"{training.duration} of batches of {training.batch_size}", seconds)


def _supervised(run: Run, costs: Costs, training: TrainingConfig, images: int) -> float:
    """Seconds of a training on so many source images."""
    steps, looks = _training(training, images)
    trained = steps * min(training.batch_size, images) * max(costs.read, costs.train)
    return trained + looks * len(run.validation) * max(costs.read, costs.forward)


def _training(training: TrainingConfig, images: int) -> tuple[int, int]:
    return _steps(training.duration, training.evaluate_every, max(1, images // training.batch_size))


def _steps(duration: Duration, evaluate_every: Duration, steps_per_epoch: int) -> tuple[int, int]:
    """Steps, and evaluations: at regular steps, where they are asked for, and after the last one."""
    steps, every = duration.steps(steps_per_epoch), evaluate_every.steps(steps_per_epoch)
    return steps, math.ceil(steps / every) if every else min(steps, 1)


def _seconds_each(work: Callable[[int], object], *, at_most: int, wait: Callable[[], object] | None = None) -> float:
    """Seconds of one thing where several are done at a time."""

    def timed(count: int) -> float:
        began = time.perf_counter()
        work(count)
        if wait is not None:
            wait()
        return time.perf_counter() - began

    count, seconds = 1, timed(1)
    if seconds < PATIENCE:  # the first one also sets things up
        seconds = timed(1)
    while count < at_most and seconds < SECONDS_A_MEASUREMENT:
        count = min(at_most, 2 * count)
        seconds = min(timed(count), timed(count))
    return seconds / count


def _groups(run: Run, name: str, split: DomainSplit) -> str:
    if name != "source":
        return ""
    groups = len(split.group_domains.unique())
    return "" if groups == len(split.members) else f" of {groups:,} groups, which the experts share"


def _free(path: Path) -> int:
    """Bytes free where the folder is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
