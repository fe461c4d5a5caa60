"""Memory, disk and hours of the five WILDS recipes on one GPU and on eight, from rates measured here.

    python scripts/scaling.py --save_rates rates.json          measure this machine's CPU, write docs/scaling.md
    python scripts/scaling.py --device cuda                    measure a GPU
    python scripts/scaling.py --rates rates.json               from rates that were measured before, in a moment

A few batches of each kind of work are timed at each recipe's size, and one update's memory is counted; everything else is the
arithmetic of dmoe/plan.py on the sizes of the real data sets. The published way stands beside ours: live experts at every step.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: waiting threads would count as work

import torch
from torch import Tensor

from dmoe import plan
from dmoe.command_line import run_main
from dmoe.config import CONFIG_FOLDER, load_config
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.partition import partition
from dmoe.data.transforms import ImageTransform
from dmoe.data.wilds import KINDS
from dmoe.errors import UserError
from dmoe.machine import keep_freed_memory
from dmoe.memory import memory_budget, peak_bytes
from dmoe.meta.learner import EpisodeBatch, Way
from dmoe.meta_stage import meta_learner
from dmoe.model import build_aggregator
from dmoe.run import Run
from dmoe.run_folder import RunFolder
from dmoe.tasks import Task
from scripts.benchmarks import page, published
from scripts.benchmarks.measuring import Place

DOCS = Path(__file__).resolve().parent.parent / "docs"
IN_CHUNKS, WHOLE = Way("forward_over_reverse", 4), Way("double_backward")


@dataclass(frozen=True)
class Size:
    """Of a split: images, domains of episodes, and domains by which experts are made."""

    images: int
    domains: int
    groups: int


@dataclass(frozen=True)
class Recipe:
    """What is not in a configuration.

    Attributes:
        download: GB of the compressed data set, by the stock package.
    """

    source: Size
    validation: Size
    target: Size
    outputs: int
    download: float


RECIPES = {
    "iwildcam": Recipe(Size(129_809, 243, 243), Size(14_961, 32, 32), Size(42_791, 48, 48), 182, 12.0),
    "camelyon": Recipe(Size(302_436, 30, 30), Size(34_904, 10, 10), Size(85_054, 10, 10), 1, 10.7),
    "rxrx1": Recipe(Size(40_612, 33, 33), Size(9_854, 4, 4), Size(34_432, 14, 14), 1139, 7.4),
    "fmow": Recipe(Size(76_863, 66, 11), Size(19_915, 18, 3), Size(22_108, 12, 2), 62, 53.9),
    "poverty": Recipe(Size(9_797, 13, 13), Size(3_909, 5, 5), Size(3_963, 5, 5), 1, 13.1),
}
"""Images: Koh et al., *WILDS*, ICML 2021, appendix E. Downloads, and poverty's countries (fold A): the stock ``wilds`` package.
fmow: years times six regions, which is the most domains that episodes can have."""


@dataclass(frozen=True)
class Rates:
    """Of one recipe's networks at its image size, on one device.

    Attributes:
        forward, train, aggregate: seconds, see :class:`dmoe.plan.Costs`.
        chunks, whole, published_meta: seconds of an image of an episode, without the experts: ours in chunks of 4, ours in one
            graph, and as published.
        chunks_memory, whole_memory, published_memory: GB of tensors of a whole update; the last two in proportion to the images.
        budget: GB that an update may take there.
    """

    forward: float
    train: float
    aggregate: float
    chunks: float
    whole: float
    published_meta: float
    chunks_memory: float
    whole_memory: float
    published_memory: float
    budget: float

    @property
    def in_chunks(self) -> bool:
        """Whether ours goes in chunks: where one graph is too large, or slower."""
        return self.whole_memory > self.budget or self.chunks < self.whole

    @property
    def meta(self) -> float:
        return self.chunks if self.in_chunks else self.whole

    @property
    def memory(self) -> float:
        return self.chunks_memory if self.in_chunks else self.whole_memory


class Counted(DomainSplit):
    """So many images of no content, in domains of near-equal size."""

    def __init__(self, size: Size, *, first: int, shape: tuple[int, int, int], regression: bool, views: int = 1) -> None:
        number = torch.arange(size.images)
        self.labels = torch.zeros(size.images) if regression else torch.zeros(size.images, dtype=torch.int64)
        self.domains = first + number % size.domains
        self.group_domains = first + number % size.domains % size.groups
        self.domain_names = {domain: str(domain) for domain in range(first, first + size.domains)}
        self.views, self._shape = views, shape

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return torch.randn(len(index), *self._shape)


def recipe_run(name: str, recipe: Recipe, *, device: str = "cpu") -> Run:
    """The recipe's run as it would be with the real data. Its folder does not exist, so no stage is finished."""
    config, kind = load_config(CONFIG_FOLDER / f"{name}.yaml", ["experts.backbone.weights=none"]), KINDS[name]
    shape = (kind.channels, kind.size, kind.size)
    regression = kind.task == "regression"
    sizes = {"source": recipe.source, "validation": recipe.validation, "target": recipe.target}
    splits: dict[str, DomainSplit] = {
        split: Counted(
            size,
            first=10_000 * number,
            shape=shape,
            regression=regression,
            views=8 if split == "source" and kind.augmentation == "turns" else 1,
        )
        for number, (split, size) in enumerate(sizes.items())
    }
    dataset = DomainDataset(name, splits, Task(kind.task, recipe.outputs), ImageTransform(shape), class_names=(), fingerprint="")
    domains = splits["source"].group_domains.unique().tolist()
    groups = partition(domains, count=config.experts.count, seed=config.seed, how=config.experts.partition)
    folder = Path(tempfile.gettempdir()) / "nowhere" / name
    return Run(config=config, folder=RunFolder(folder), dataset=dataset, groups=groups, device=torch.device(device))


def hours(run: Run, rates: Rates, *, gpus: int, meta: float | None = None) -> dict[str, float]:
    """Hours of each stage, ours; ``meta``: by other seconds of an image of an episode. Reading is left out: it depends on the disk.

    Several GPUs share experts, tokens, the episodes of an update and the domains of an evaluation.
    """

    def entries(meta: float) -> dict[str, float]:
        costs = plan.Costs(read=0.0, forward=rates.forward, train=rates.train, aggregate=rates.aggregate, meta=meta)
        # On a CPU the plan counts one machine; so the division is done here.
        return {entry.stage: entry.seconds / 3600 for entry in plan.entries(replace(run, device=torch.device("cpu")), costs)}

    found, looks = entries(rates.meta if meta is None else meta), entries(0.0)["meta"]
    updates = (found["meta"] - looks) / min(gpus, run.config.meta.domains_per_update)
    shared = {stage: found[stage] / gpus for stage in ("tokens", "test")}
    return {**found, **shared, "experts": found["experts"] / min(gpus, run.config.experts.count), "meta": updates + looks / gpus}


def published_hours(run: Run, rates: Rates, *, gpus: int) -> dict[str, float]:
    """The same as published: no tokens are stored, every expert sees the images of every step again; only experts are spread."""
    config, source, validation = run.config, run.source, run.validation
    live = config.experts.count * rates.forward / 3600  # an image through all experts
    ours = {**hours(run, rates, gpus=1), "diagnosis": 0.0}
    training = config.aggregator.training
    steps, looks = plan._training(training, len(source))
    aggregator = steps * (min(training.batch_size, len(source)) * live + rates.aggregate / 3600) + looks * len(validation) * live
    settings = config.meta
    episodes = settings.domains_per_update
    updates = settings.duration.steps(max(1, len(source) // (episodes * (settings.support_size + settings.query_size))))
    plainly = hours(run, rates, gpus=1, meta=rates.published_meta)["meta"]
    experts = hours(run, rates, gpus=gpus)["experts"]
    # Its log needs the query images once more, before adapting.
    more = updates * episodes * (settings.support_size * live + settings.query_size * rates.forward / 3600)
    return {**ours, "experts": experts, "tokens": 0.0, "aggregator": aggregator, "meta": plainly + more}


def measure(name: str, run: Run, *, images: int) -> Rates:
    """Time a few batches of at most so many images, and count an update's memory."""
    device, settings = run.device, run.config.meta
    student = run.network(run.config.student_backbone, "scaling", to_train=False)
    expert = run.network(run.config.token_backbone, "scaling expert", to_train=False)
    outputs = run.dataset.task.num_outputs
    teacher = build_aggregator(run.config.aggregator, width=student.width, num_outputs=outputs).to(device).eval()
    learner = meta_learner(run, teacher, student)
    count = min(images, settings.support_size)
    index = torch.arange(count)
    pictures, labels = run.source.images(index).to(device), run.source.labels[index].to(device)
    batch = run.config.aggregator.training.batch_size
    tokens = torch.randn(batch, run.config.experts.count, student.width, device=device)
    many = run.source.labels[torch.arange(batch)].to(device)
    masked = torch.randn(count, run.config.experts.count - 1, student.width, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else None

    def forward(number: int) -> None:
        with torch.inference_mode():
            expert.eval()(pictures[:number])

    def train(number: int) -> None:
        run.dataset.task.loss(expert(pictures[:number]), labels[:number]).backward()

    def aggregate(steps: int) -> None:
        for _ in range(steps):
            run.dataset.task.loss(teacher.logits(tokens), many).backward()

    def meta(number: int, way: Way = IN_CHUNKS) -> None:
        learner.way = way
        part = slice(None, number)
        learner.add_gradients([EpisodeBatch(pictures[part], masked[part], pictures[part], labels[part])])

    def as_published(number: int) -> None:
        part = slice(None, number)
        published.add_meta_gradients(
            student,
            teacher,
            masked[part],
            pictures[part],
            pictures[part],
            labels[part],
            inner_lr=settings.inner_lr,
            loss=run.dataset.task.loss,
            query_before=False,
        )

    for number in (1, 4):  # what is made once, gradients and caches, is made
        meta(min(number, count))
    chunk = peak_bytes(lambda: meta(min(IN_CHUNKS.chunk_size or 1, count)), device)
    few, more = (peak_bytes(lambda n=n: as_published(n), device) for n in (1, 2))
    few_ours, more_ours = (peak_bytes(lambda n=n: meta(n, WHOLE), device) for n in (1, 2))
    of_episode = (settings.support_size + settings.query_size) / 2  # what was measured has as many query images as support images
    print(f"{name}: measured with {count} images of {pictures.shape[-1]} pixels", flush=True)
    return Rates(
        forward=plan._seconds_each(forward, at_most=count, wait=wait),
        train=plan._seconds_each(train, at_most=count, wait=wait),
        aggregate=plan._seconds_each(aggregate, at_most=4, wait=wait),
        chunks=plan._seconds_each(meta, at_most=count, wait=wait) / 2,
        whole=plan._seconds_each(lambda number: meta(number, WHOLE), at_most=count, wait=wait) / 2,
        published_meta=plan._seconds_each(as_published, at_most=count, wait=wait) / 2,
        chunks_memory=chunk / 1e9,
        whole_memory=(few_ours + (more_ours - few_ours) * (of_episode - 1)) / 1e9,
        published_memory=(few + (more - few) * (of_episode - 1)) / 1e9,
        budget=memory_budget(device) / 1e9,
    )


def markdown(rates: Mapping[str, Rates], machine: Mapping[str, Any]) -> str:
    """The page."""
    on_gpu = str(machine["device"]).startswith("cuda")
    device = "GPU" if on_gpu else "machine"
    lines = [
        *HEAD.format(machine=page.machine(machine), whose=OF_A_GPU if on_gpu else OF_A_CPU, device=device).splitlines(),
        "",
        "| hours | ours | as published | ours, on 8 | as published, on 8 |",
        "|---" * 5 + "|",
    ]
    disk = ["", "| GB | memory of an update, ours in one graph | in chunks | as published | taken | disk: tokens | download |"]
    disk += ["|---" * 7 + "|"]
    stages = ["", "| hours on one | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for name, found in rates.items():
        run = recipe_run(name, RECIPES[name])
        one, eight = hours(run, found, gpus=1), hours(run, found, gpus=8)
        plain, plain_eight = published_hours(run, found, gpus=1), published_hours(run, found, gpus=8)
        width = WIDTHS[name]
        sums = " | ".join(_told(sum(stage.values())) for stage in (one, plain, eight, plain_eight))
        lines.append(f"| `{name}` | {sums} |")
        stored, download = plan.token_bytes(run, width=width) / 1e9, RECIPES[name].download
        sizes = f"{found.whole_memory:.1f} | {found.chunks_memory:.1f} | {found.published_memory:.1f}"
        taken = "chunks" if found.in_chunks else "one graph"
        disk.append(f"| `{name}` | {sizes} | {taken} | {stored:.1f} | {download:.1f} |")
        for way, each in (("ours", one), ("as published", plain)):
            stages.append(f"| `{name}`, {way} | " + " | ".join(_told(each[stage]) for stage in STAGES) + " |")
    measured = ["", "| images a second | size | forward | and backward | meta-step, ours in one graph | in chunks | as published |"]
    measured += ["|---" * 7 + "|"]
    for name, found in rates.items():
        numbers = (found.forward, found.train, found.whole, found.chunks, found.published_meta)
        measured.append(f"| `{name}` | {KINDS[name].size} | " + " | ".join(f"{1 / seconds:.3g}" for seconds in numbers) + " |")
    return (
        "\n".join(
            [*lines, *stages, *disk, *FOOT.format(budget=min(found.budget for found in rates.values())).splitlines(), *measured]
        )
        + "\n"
    )


HEAD = """\
# What the WILDS recipes cost

Written by `python scripts/scaling.py`: the configurations in `configs/`, the sizes of the real data sets (Koh et al., *WILDS*,
ICML 2021, appendix E) and the arithmetic of the plan that every run prints, with rates measured on
**{machine}**. Nothing here was run with the real data.

{whose}

Reading images is left out: it depends on the disk and on how many processes read, see `scripts/benchmark_loading.py`. With eight
{device}s experts are trained side by side; tokens, the domains of evaluations and the episodes of an update are shared, of
which the recipes have one (`meta.domains_per_update`). As published, only experts can be spread, frozen experts see the images of
every step again, and gradients are taken by double backward through the plain network.
"""
OF_A_GPU = "These are figures of that GPU, float32."
OF_A_CPU = """\
**These are figures of that CPU, extrapolated.** Figures of a GPU need rates measured on one:
`python scripts/scaling.py --device cuda --images 32`. What carries over is the disk and, roughly, the ratio of the two ways."""
FOOT = """
Memory is that of the tensors of one update beside the networks, extrapolated from episodes of one image and of two; in chunks of 4
images it does not grow with the episode. Ours takes the faster way that fits into what a run allows itself there (`meta.memory_gb`:
{budget:.0f} GB), as `meta.gradient: auto` does with chunks of all sizes. `tokens.storage=float16` halves the tokens on disk."""
STAGES = ["experts", "tokens", "aggregator", "student", "meta", "diagnosis", "test"]
WIDTHS = {"iwildcam": 2048, "camelyon": 1024, "rxrx1": 2048, "fmow": 1024, "poverty": 512}
"""Of the features, D."""


def _told(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def read_rates(path: Path) -> tuple[dict[str, Rates], dict[str, Any]]:
    """Rates and the machine that they were measured on.

    Raises:
        UserError: the file holds no rates.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: Rates(**rates) for name, rates in found["rates"].items()}, dict(found["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as rates ({error}): --save_rates writes them") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=int, default=4, help="at most in a timed batch; more on a GPU, to fill it")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="measure nothing, take these")
    parser.add_argument("--save_rates", type=Path, metavar="FILE")
    parser.add_argument("--page", type=Path, default=DOCS / "scaling.md")
    options = parser.parse_args(arguments)
    if options.images < 4:
        raise UserError(f"--images: must be >= 4, a chunk of ours, got {options.images}")
    if options.rates:
        rates, machine = read_rates(options.rates)
    else:
        keep_freed_memory()
        torch.set_num_threads(options.threads)
        machine = Place(options.device, options.threads).machine
        runs = {name: recipe_run(name, recipe, device=options.device) for name, recipe in RECIPES.items()}
        rates = {name: measure(name, run, images=options.images) for name, run in runs.items()}
    if options.save_rates:
        content = {"machine": machine, "rates": {name: asdict(found) for name, found in rates.items()}}
        options.save_rates.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    options.page.write_text(markdown(rates, machine), encoding="utf-8")
    print(options.page)


if __name__ == "__main__":
    run_main(main)
