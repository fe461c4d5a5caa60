"""The five WILDS data sets from the command line, on drawings, with the networks of their configurations.

All stages; experts trained by themselves; the authors' checkpoints, tested and taken over; and what a user may get wrong.
"""

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from wilds_sample import CONTENTS, WildsRoot

from dmoe.artifacts import read_json, under_prefix
from dmoe.command_line import run_main
from dmoe.config import CONFIG_FOLDER, load_config
from dmoe.data.partition import partition, read_partition
from dmoe.data.registry import load_dataset
from dmoe.data.wilds_import import fractional_seconds, wilds
from dmoe.evaluation import Evaluation, Method
from dmoe.models.torchvision_import import torchvision
from dmoe.protocols import Protocol
from dmoe.run import Run
from scripts import make_wilds_sample

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("iwildcam", "camelyon", "rxrx1", "fmow", "poverty")
STOCK = {"iwildcam": "iwildcam", "camelyon": "camelyon17", "rxrx1": "rxrx1", "fmow": "fmow", "poverty": "poverty"}
EXPERTS = {"iwildcam": 10, "camelyon": 5, "rxrx1": 3, "fmow": 4, "poverty": 3}
TRAINED_HERE = {**EXPERTS, "iwildcam": 3, "camelyon": 2, "fmow": 2}
"""As few as will do where all stages are run: each is a process of its own."""
SEEDS = {"iwildcam": 1, "camelyon": 3407}
METHODS = ["ERM student", "batch statistics", "before adapting", "adapted"]
PRINTED = {
    "iwildcam": ["macro F1", "accuracy"],
    "camelyon": ["accuracy"],
    "rxrx1": ["accuracy"],
    "fmow": ["worst-region accuracy", "accuracy"],
    "poverty": ["worst-group r", "r"],
}
PREDICTIONS = {
    "iwildcam": "iwildcam_split:test_seed:1_epoch:best_pred.csv",
    "camelyon": "camelyon17_split:test_seed:3407_epoch:best_pred.csv",
    "rxrx1": "rxrx1_split:test_seed:1000_epoch:best_pred.csv",
    "fmow": "fmow_split:test_seed:42_epoch:best_pred.csv",
    "poverty": "poverty_split:test_fold:A_epoch:best_pred.csv",
}

SIZE = 32
LOADS = ("--load_trained_experts", "--load_pretrained_aggregator", "--load_pretrained_student")
SMALL = ["experts.backbone.weights=none", f"data.image_size={SIZE}", "data.workers=0", "meta.support_size=3", "meta.query_size=2"]
ONE_STEP = [
    *SMALL,
    *(
        f"{stage}.training.{value}"
        for stage in ("experts", "aggregator", "student")
        for value in ("batch_size=4", "duration=1 step")
    ),
    "meta.duration=1 step",
]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def start(script: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, script, "--gpu", "-1", "--threads", "1", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=600)
    return Ended(process.returncode, out, err)


Call = Callable[..., Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A script without the seconds that a process of its own takes to start."""

    def run(script: str, *words: object) -> Ended:
        common = ["--gpu", "-1", "--threads", "1"] if not script.startswith("scripts/") else []
        monkeypatch.setattr(sys, "argv", [script, *common, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)
        said = capsys.readouterr()
        return Ended(int(str(ended.value)), said.out, said.err)

    return run


def well(ended: Ended) -> str:
    """What was said by a run that was to end well."""
    assert ended.status == 0, ended.err
    return ended.out


def refusal(ended: Ended) -> str:
    """The one line with which wrong input ends."""
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    return ended.err.removeprefix("error: ").rstrip("\n")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.parent.relative_to(folder)): path.read_bytes() for path in folder.rglob("weights.safetensors")}


def trained(folder: Path) -> list[str]:
    """Stages that have left weights."""
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("weights.safetensors"))


def stages(experts: int) -> list[str]:
    return sorted(["aggregator", "meta", "student", *(f"experts/expert_{number:02d}" for number in range(experts))])


def predictions(folder: Path, method: str, name: str) -> list[float]:
    return [
        float(line) for line in (folder / "predictions" / method.replace(" ", "_") / PREDICTIONS[name]).read_text().split("\n")[:-1]
    ]


@pytest.fixture(scope="module")
def small_poverty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poverty as in the other tests, with images of 28 pixels in place of 224: there are 3,700."""
    root = tmp_path_factory.mktemp("poverty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_wilds_sample, "CELL_PX", 2)
        make_wilds_sample.RELEASES["poverty"].make(root, CONTENTS["poverty"])
    return root


DataOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def data_of(wilds_root: WildsRoot, small_poverty: Path) -> DataOf:
    """The folder to give as ``--data_dir``."""
    return lambda name: small_poverty if name == "poverty" else wilds_root(name)


def stock_subset(name: str, root: Path, split: str) -> Any:
    """A split as the stock package has it."""
    with fractional_seconds():
        return (
            wilds().get_dataset(STOCK[name], root_dir=str(root), **({"fold": "A"} if name == "poverty" else {})).get_subset(split)
        )


def stock_metrics(subset: Any, predicted: Sequence[float]) -> dict[str, float]:
    y = torch.tensor(predicted, dtype=subset.y_array.dtype).view_as(subset.y_array)
    return {key: float(value) for key, value in subset.eval(y, subset.y_array, subset.metadata_array)[0].items()}


# All stages


@dataclass(frozen=True)
class Runs:
    """All stages of the five data sets, two runs at a time; ``paper`` is one more."""

    path: Path
    ended: Mapping[str, Future[Ended]]

    def folder(self, name: str) -> Path:
        """Of the run, once it has ended well."""
        well(self.ended[name].result())
        return self.path / name

    def out(self, name: str) -> str:
        return well(self.ended[name].result())


@pytest.fixture(scope="module")
def runs(data_of: DataOf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    path = tmp_path_factory.mktemp("runs")
    roots = {name: data_of(name) for name in NAMES}

    def run(name: str) -> Ended:
        count = [f"experts.count={TRAINED_HERE[name]}"] if TRAINED_HERE[name] != EXPERTS[name] else []
        where = ["--data_dir", roots[name], "--run_dir", path / name]
        return end(start("run.py", "--dataset", name, *where, *ONE_STEP, *count))

    def paper() -> Ended:
        """camelyon by the paper's values: two experts as two processes that start together, then the rest."""
        words = ["--dataset", "camelyon", "--data_dir", roots["camelyon"], "--run_dir", path / "paper"]
        words += [*ONE_STEP, "preset=paper", "experts.count=2"]
        for process in [start("train_single_expert.py", "--expert_idx", number, *words) for number in range(2)]:
            well(end(process))
        shutil.copytree(path / "paper" / "experts", path / "paper_experts")  # keeps times of change
        return end(start("run.py", "--load_trained_experts", *words))

    with ThreadPoolExecutor(2) as pool:
        yield Runs(path, {**{name: pool.submit(run, name) for name in NAMES}, "paper": pool.submit(paper)})
    shutil.rmtree(path)


@pytest.mark.parametrize("name", NAMES)
def test_run_ends_well_and_leaves_weights_of_every_stage(runs: Runs, name: str) -> None:
    assert trained(runs.folder(name)) == stages(TRAINED_HERE[name])


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_printed_under_the_names_that_people_know_them_by(runs: Runs, name: str) -> None:
    lines = runs.out(name).splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.endswith("worst domain"))
    headline = "r" if name == "poverty" else "accuracy"
    assert re.split("  +", lines[head].strip()) == [*PRINTED[name], f"mean {headline} of domains", "worst domain"]
    assert [re.split("  +", line)[0] for line in lines[head + 2 : head + 6]] == METHODS


@pytest.mark.parametrize("name", NAMES)
def test_predictions_give_the_official_metrics_of_the_rows(runs: Runs, data_of: DataOf, name: str) -> None:
    folder, subset = runs.folder(name), stock_subset(name, data_of(name), "test")
    found = rows(folder)
    assert [row["method"] for row in found] == METHODS
    for row in found:
        predicted = predictions(folder, row["method"], name)
        assert len(predicted) == len(subset)
        assert row["overall"] == pytest.approx(stock_metrics(subset, predicted), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_testing_the_finished_run_again_gives_the_same_rows_and_predictions(runs: Runs, call: Call, name: str) -> None:
    folder = runs.folder(name)
    files = [folder / "results.jsonl", *sorted((folder / "predictions").rglob("*.csv"))]
    before = [path.read_bytes() for path in files]
    assert len(files) == 1 + len(METHODS)
    out = well(call("run.py", "--test", "--run_dir", folder))
    assert [path.read_bytes() for path in files] == before
    tables = [re.findall(r"(?s)target domains, adapted.*(?=\ntested)", said) for said in (runs.out(name), out)]
    assert tables[0] == tables[1] != []


@pytest.mark.parametrize("name", NAMES)
def test_published_number_of_experts_is_configured_and_can_share_the_sample(data_of: DataOf, name: str) -> None:
    overrides = [f"data.dir={data_of(name)}"]
    for preset in ("reference", "paper"):
        config = load_config(CONFIG_FOLDER / f"{name}.yaml", [f"preset={preset}", *overrides])
        assert config.experts.count == EXPERTS[name]
        domains = load_dataset(name, config.data).splits["source"].group_domains.unique().tolist()
        groups = partition(domains, count=config.experts.count, seed=config.seed, how=config.experts.partition)
        assert sorted(set(groups.values())) == list(range(EXPERTS[name]))


# Experts by themselves, and the paper's values


def expert_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_experts_trained_by_two_processes_at_once_are_used_and_left_alone(runs: Runs) -> None:
    folder, out = runs.folder("paper"), runs.out("paper")
    assert expert_files(folder / "experts") == expert_files(runs.path / "paper_experts")
    assert "to train" not in out
    assert trained(folder) == stages(2)
    assert [row["method"] for row in rows(folder)] == METHODS


def test_papers_values_run_through_all_stages(runs: Runs) -> None:
    assert runs.out("paper").startswith("camelyon, preset paper, seed 3407, ")
    for row in rows(runs.folder("paper")):
        used = row["config"]
        assert (used["meta"]["inner_loss"], used["meta"]["mask"], used["meta"]["domains_per_update"]) == ("norm", "zero", 4)
        assert used["experts"]["training"]["optimizer"]["lr"] == 1e-4
        assert not row["score_support"]


# The authors' checkpoints, against a straight line of torch

SUPPORT = 6
INNER_LR = {"iwildcam": 1e-5, "camelyon": 1e-3}
"""Enough to change predictions."""

TOLERANCE = 1e-4
BACKBONE = {"iwildcam": "resnet50", "camelyon": "densenet121"}
DOMAIN_FIELD = {"iwildcam": "location", "camelyon": "slide"}


def pictures(subset: Any) -> Tensor:
    """All images of a stock split, ``[n, 3, SIZE, SIZE]``, normalised as for ImageNet."""
    resized = [
        np.asarray(subset[i][0].convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
        for i in range(len(subset))
    ]
    images = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def fresh(name: str, outputs: int) -> tuple[nn.Module, nn.Linear]:
    """torchvision's network, with a head of so many outputs; and that head."""
    network: nn.Module = torchvision().models.get_model(BACKBONE[name], weights=None)
    place = "fc" if BACKBONE[name] == "resnet50" else "classifier"
    head = nn.Linear(network.get_submodule(place).in_features, outputs)  # type: ignore[arg-type]
    setattr(network, place, head)
    return network.eval(), head


class Wrapped(nn.Module):
    """A torchvision network as the authors wrap it: its modules in a row, so that a DenseNet's last ReLU is lost."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        *features, head = network.children()
        self.features = nn.Sequential(*features)
        if len(features) == 1:
            self.features.add_module("avg_pool", nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(head)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


@torch.no_grad()
def like_trained(name: str, outputs: int, images: Tensor) -> nn.Module:
    """A network whose batch-norm has seen such images, and whose head tells them apart."""
    network, head = fresh(name, outputs)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, std=0.2)
    network.train()(images)
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
    features = Wrapped(network.eval()).features(images).flatten(1)
    head.weight.normal_().div_(features.std() * features.shape[1] ** 0.5)
    head.bias.copy_(-head.weight @ features.mean(0))
    return network


def published_aggregator(width: int, outputs: int) -> dict[str, Tensor]:
    attend, first, second = nn.MultiheadAttention(width, 16), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    parts = {
        "0.fn.attend": attend,
        "1.fn.net.0": first,
        "1.fn.net.3": second,
        "0.norm": nn.LayerNorm(width),
        "1.norm": nn.LayerNorm(width),
    }
    tensors = {
        f"transformer.layers.0.{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()
    }
    for part, module in (("mlp.0", nn.LayerNorm(width)), ("mlp.1", nn.Linear(width, outputs))):
        tensors |= {f"{part}.{key}": value for key, value in module.state_dict().items()}
    return {key: value + 0.02 * torch.randn_like(value) for key, value in tensors.items()}


@dataclass(frozen=True)
class Published:
    """A folder of checkpoints as the authors publish them, made of networks that nobody trained."""

    name: str
    folder: Path
    root: Path
    outputs: int
    groups: Mapping[int, int]

    @property
    def stem(self) -> str:
        return f"{self.name}_{EXPERTS[self.name]}experts_seed{SEEDS[self.name]}"

    def path(self, what: str) -> Path:
        return self.folder / f"{self.stem}_{what}_best.pth"

    def tensors(self, what: str) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = torch.load(self.path(what), weights_only=True)
        return loaded

    @property
    def words(self) -> list[object]:
        """For the command line."""
        return ["--dataset", self.name, "--data_dir", self.root, "--checkpoint_dir", self.folder]


STUDENTS = {"meta": "meta_student", "pretrained": "pretrained_exp"}


def publish(name: str, folder: Path, root: Path, *, pretrained: bool) -> Published:
    """Write all files that there are, or those alone that are needed for testing."""
    torch.manual_seed(5)
    train = stock_subset(name, root, "train")
    images = pictures(train)[::2]
    outputs = 1 if name == "camelyon" else int(train.dataset.n_classes)
    domains = sorted(set(train.metadata_array[:, train.metadata_fields.index(DOMAIN_FIELD[name])].tolist()))
    # Not as any seed of ours would share them out.
    groups = {int(domain): number % EXPERTS[name] for number, domain in enumerate(reversed(domains))}
    made = Published(name, folder, root, outputs, groups)
    for number in range(EXPERTS[name]):
        torch.save(like_trained(name, outputs, images).state_dict(), made.path(f"{number}_exp"))
    stages = ("meta", "pretrained") if pretrained else ("meta",)
    for what in (STUDENTS[stage] for stage in stages):
        torch.save(Wrapped(like_trained(name, outputs, images)).state_dict(), made.path(what))
    width = made.tensors("meta_student")["classifier.0.weight"].shape[1]
    for stage in stages:
        torch.save(published_aggregator(width, outputs), made.path(f"{stage}_selector"))
    lists = [[domain for domain, expert in groups.items() if expert == number] for number in range(EXPERTS[name])]
    (folder / "domain_split.pkl").write_bytes(pickle.dumps((lists, groups)))
    return made


@pytest.fixture(scope="module")
def published(data_of: DataOf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Published]]:
    """The published checkpoints of a data set, made when they are first asked for; iwildcam's are no more than a test needs."""
    made: dict[str, Published] = {}

    def of(name: str) -> Published:
        if name not in made:
            folder = tmp_path_factory.mktemp(f"published_{name}")
            made[name] = publish(name, folder, data_of(name), pretrained=name == "camelyon")
        return made[name]

    yield of
    for one in made.values():
        shutil.rmtree(one.folder)


class Expected(NamedTuple):
    """Logits ``[n, K]`` of all target images, in data-set order; and the images ``[n, C, H, W]`` by which each domain was known."""

    adapted: Tensor
    unadapted: Tensor
    images: Tensor
    members: list[Tensor]


def empty(published: Published) -> nn.Module:
    """A network whose tensors are yet to come."""
    with torch.device("meta"):
        return fresh(published.name, published.outputs)[0]


def by_hand(published: Published, *, expert_batch_norm: str) -> Expected:
    """Testing as METHOD section 4 has it, in a straight line."""
    subset = stock_subset(published.name, published.root, "test")
    images = pictures(subset)
    domains = subset.metadata_array[:, subset.metadata_fields.index(DOMAIN_FIELD[published.name])].long()
    members = [torch.where(domains == domain)[0] for domain in domains.unique().tolist()]
    supports = [images[index[:SUPPORT]] for index in members]

    tokens: list[list[Tensor]] = [[] for _ in members]
    for number in range(EXPERTS[published.name]):
        expert = empty(published)
        expert.load_state_dict(published.tensors(f"{number}_exp"), assign=True)
        features = Wrapped(expert).features
        features.train(expert_batch_norm == "batch")
        with torch.no_grad():
            for found, support in zip(tokens, supports, strict=True):
                found.append(features(support).flatten(1))

    teacher = published.tensors("meta_selector")
    width = teacher["mlp.0.weight"].shape[0]
    layer = "transformer.layers.0"
    attention = nn.MultiheadAttention(width, 16, batch_first=True)
    attention.load_state_dict(under_prefix(f"{layer}.0.fn.attend", teacher))

    def target(x: Tensor) -> Tensor:
        h = F.layer_norm(x, (width,), teacher[f"{layer}.0.norm.weight"], teacher[f"{layer}.0.norm.bias"])
        x = x + attention(h, h, h)[0]
        h = F.layer_norm(x, (width,), teacher[f"{layer}.1.norm.weight"], teacher[f"{layer}.1.norm.bias"])
        h = F.gelu(F.linear(h, teacher[f"{layer}.1.fn.net.0.weight"], teacher[f"{layer}.1.fn.net.0.bias"]))
        h = F.linear(h, teacher[f"{layer}.1.fn.net.3.weight"], teacher[f"{layer}.1.fn.net.3.bias"])
        return (x + h).mean(1)

    logits = torch.zeros(len(images), published.outputs)
    unadapted = torch.zeros(len(images), published.outputs)
    for index, support, found in zip(members, supports, tokens, strict=True):
        student = Wrapped(empty(published))
        student.load_state_dict(published.tensors("meta_student"), assign=True)
        student.eval()
        with torch.no_grad():
            unadapted[index] = student(images[index])
            t = target(torch.stack(found, dim=1))
        loss = (student.features(support).flatten(1) - t).square().mean()
        parameters = list(student.features.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=INNER_LR[published.name])
            logits[index] = student(images[index])
    return Expected(logits, unadapted, images, members)


def classes(logits: Tensor) -> list[int]:
    chosen: list[int] = (logits[:, 0] > 0).long().tolist() if logits.shape[1] == 1 else logits.argmax(1).tolist()
    return chosen


def clear(logits: Tensor, *, beyond: float) -> list[bool]:
    """Whose prediction stays what it is when logits change by so little."""
    if logits.shape[1] == 1:
        margins = logits[:, 0].abs()
    else:
        best = logits.topk(2, dim=1).values
        margins = (best[:, 0] - best[:, 1]) / 2
    found: list[bool] = (margins > beyond).tolist()
    return found


def agree(ours: Sequence[float], expected: Tensor, *, beyond: float) -> bool:
    """Whether predictions are those of the expected logits, wherever these are not a tie to rounding."""
    sure = clear(expected, beyond=beyond)
    assert sum(sure) > 0.9 * len(sure)
    return all(one == other for one, other, told in zip(ours, classes(expected), sure, strict=True) if told)


@pytest.mark.parametrize("expert_batch_norm", ["running", "batch"])
@pytest.mark.parametrize("name", ["iwildcam", "camelyon"])
def test_published_checkpoints_are_tested_as_a_straight_line_of_torch_does(
    published: Callable[[str], Published],
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    expert_batch_norm: str,
) -> None:
    theirs = published(name)
    methods: dict[str, Method] = {}
    original = Run.evaluate_all

    def watched(
        run: Run, tested: Mapping[str, Method], split: str, protocols: Sequence[Protocol], **more: Any
    ) -> dict[str, list[Evaluation]]:
        methods.update(tested)
        return original(run, tested, split, protocols, **more)

    monkeypatch.setattr(Run, "evaluate_all", watched)
    words = [f"data.image_size={SIZE}", "data.workers=0", f"meta.inner_lr={INNER_LR[name]}", "experts.backbone.weights=none"]
    words += [f"evaluation.support_size={SUPPORT}", f"evaluation.expert_batch_norm={expert_batch_norm}"]
    words += ["meta.support_size=3", "meta.query_size=2"]
    folder = tmp_path / "run"
    out = well(call("run.py", "--test", *theirs.words, "--run_dir", folder, *words))

    expected = by_hand(theirs, expert_batch_norm=expert_batch_norm)
    scale = float(expected.adapted.abs().max())
    for index in expected.members:
        images = expected.images[index]
        ours = methods["adapted"].adapt(images[:SUPPORT]).logits(images)
        torch.testing.assert_close(ours, expected.adapted[index], rtol=0, atol=TOLERANCE * scale)
    written = predictions(folder, "adapted", name)
    assert agree(written, expected.adapted, beyond=TOLERANCE * scale)
    assert agree(predictions(folder, "before adapting", name), expected.unadapted, beyond=TOLERANCE * scale)
    assert classes(expected.adapted) != classes(expected.unadapted)
    assert len(set(classes(expected.adapted))) > 1
    assert not (folder / "experts").exists()  # a test leaves them free to be taken over with the published partition
    assert [row["method"] for row in rows(folder)] == METHODS[0 if theirs.path("pretrained_exp").exists() else 2 :]

    metrics = stock_metrics(stock_subset(name, theirs.root, "test"), written)
    (line,) = (line for line in out.splitlines() if re.match("adapted  ", line))
    keys = {"iwildcam": ["F1-macro_all", "acc_avg"], "camelyon": ["acc_avg"]}[name]
    assert re.split("  +", line)[1 : 1 + len(keys)] == [f"{100 * metrics[key]:.1f}" for key in keys]


# The authors' checkpoints, taken over


@dataclass(frozen=True)
class TakenOver:
    published: Published
    folder: Path
    out: str


@pytest.fixture(scope="module")
def taken_over(published: Callable[[str], Published], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TakenOver]:
    """camelyon, from the authors' pretrained networks: meta-trained for a step and tested."""
    theirs, path = published("camelyon"), tmp_path_factory.mktemp("taken_over")
    out = well(end(start("run.py", *LOADS, *theirs.words, "--run_dir", path / "run", *SMALL, "meta.duration=1 step")))
    yield TakenOver(theirs, path / "run", out)
    shutil.rmtree(path)


def test_what_is_taken_over_is_said_and_recorded(taken_over: TakenOver) -> None:
    stem = taken_over.published.stem
    files = {f"experts/expert_{number:02d}": f"{stem}_{number}_exp_best.pth" for number in range(5)}
    files |= {"aggregator": f"{stem}_pretrained_selector_best.pth", "student": f"{stem}_pretrained_exp_best.pth"}
    for stage, file in files.items():
        assert read_json(taken_over.folder / stage / "manifest.json")["figures"]["taken_from"] == file
        assert f"taken from {taken_over.published.folder / file}" in taken_over.out
    assert trained(taken_over.folder) == stages(5)
    assert [row["method"] for row in rows(taken_over.folder)] == METHODS


def test_what_is_taken_over_is_not_planned_to_be_trained(taken_over: TakenOver) -> None:
    for stage in ("experts", "aggregator", "student"):
        (line,) = re.findall(rf"(?m)^  {stage}  .*$", taken_over.out)
        assert line.endswith("  finished")


def test_published_partition_is_taken_over(taken_over: TakenOver) -> None:
    groups = read_partition(taken_over.folder / "experts" / "partition.json")
    assert groups == taken_over.published.groups
    assert groups != partition(list(groups), count=5, seed=3407, how="shuffled")


def test_run_goes_on_in_its_folder_without_the_published_files(taken_over: TakenOver, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(taken_over.folder, folder, copy_function=os.link)
    shutil.rmtree(folder / "meta")
    for path in (folder / "model.json", folder / "results.jsonl"):
        path.unlink()
    out = well(call("run.py", "--run_dir", folder))
    assert out.count("already finished from the same inputs") == 4  # experts, aggregator, student, and ranges: of equal weights
    assert out.count("already stored") == 2
    assert weights(folder) == weights(taken_over.folder)
    assert [row["domains"] for row in rows(folder)] == [row["domains"] for row in rows(taken_over.folder)]


def test_exported_files_hold_the_tensors_that_were_taken_over(taken_over: TakenOver, call: Call, tmp_path: Path) -> None:
    well(call("scripts/export_published.py", taken_over.folder, tmp_path))
    theirs = taken_over.published
    for what in (*(f"{number}_exp" for number in range(5)), "pretrained_exp", "pretrained_selector"):
        before, after = theirs.tensors(what), torch.load(tmp_path / theirs.path(what).name, weights_only=True)
        assert set(after) == set(before)
        assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    lists, expert_of = pickle.loads((tmp_path / "domain_split.pkl").read_bytes())
    assert expert_of == theirs.groups
    assert [sorted(domains) for domains in lists] == [sorted(d for d, e in theirs.groups.items() if e == n) for n in range(5)]
    meta = torch.load(tmp_path / theirs.path("meta_student").name, weights_only=True)
    assert not torch.equal(meta["classifier.0.weight"], theirs.tensors("pretrained_exp")["classifier.0.weight"])


# What a user may get wrong


@pytest.fixture
def camelyon(published: Callable[[str], Published], tmp_path: Path) -> Published:
    """The published checkpoints, to damage: replace files, but do not write into them."""
    theirs = published("camelyon")
    folder = tmp_path / "model"
    shutil.copytree(theirs.folder, folder, copy_function=os.link)
    return Published(theirs.name, folder, theirs.root, theirs.outputs, theirs.groups)


Refused = Callable[..., str]


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Refused:
    """The line with which run.py refuses its arguments, having written nothing."""

    def run(*words: object) -> str:
        folder = tmp_path / "refused"
        line = refusal(call("run.py", "--run_dir", folder, *SMALL, *words))
        assert not folder.exists()
        return line

    return run


@pytest.mark.parametrize("flags", [["--test"], LOADS], ids=["test", "load"])
class TestCheckpointsThatDoNotFit:
    def test_of_another_data_set(self, camelyon: Published, data_of: DataOf, refused: Refused, flags: Sequence[str]) -> None:
        line = refused("--dataset", "rxrx1", "--data_dir", data_of("rxrx1"), "--checkpoint_dir", camelyon.folder, *flags)
        assert line.startswith(f"{camelyon.folder}: holds {camelyon.stem}, expected rxrx1_3experts_seed1000: ")

    def test_of_another_number_of_experts(self, camelyon: Published, refused: Refused, flags: Sequence[str]) -> None:
        line = refused(*camelyon.words, *flags, "experts.count=3")
        assert line.startswith(f"{camelyon.folder}: holds {camelyon.stem}, expected camelyon_3experts_seed3407: ")

    @pytest.mark.parametrize("part", ["expert", "aggregator", "student"])
    def test_with_a_tensor_of_another_shape(self, camelyon: Published, refused: Refused, flags: Sequence[str], part: str) -> None:
        stage = "meta" if "--test" in flags else "pretrained"
        what = {"expert": "4_exp", "aggregator": f"{stage}_selector", "student": STUDENTS[stage]}[part]
        tensors = camelyon.tensors(what)
        key = {"expert": "features.norm5.bias", "aggregator": "mlp.0.bias", "student": "classifier.0.bias"}[part]
        tensors[key] = torch.zeros(3)
        camelyon.path(what).unlink()
        torch.save(tensors, camelyon.path(what))
        assert refused(*camelyon.words, *flags).startswith(f"{camelyon.path(what)}: {key} is [3], the network's is [")

    def test_with_a_program_in_the_domain_split(
        self, camelyon: Published, refused: Refused, flags: Sequence[str], tmp_path: Path
    ) -> None:
        witness, path = tmp_path / "ran", camelyon.folder / "domain_split.pkl"
        path.unlink()
        path.write_bytes(pickle.dumps(([[1]], Program(witness))))
        assert refused(*camelyon.words, *flags).startswith(f"{path}: holds more than lists, dicts and numbers (")
        assert not witness.exists()
        pickle.loads(path.read_bytes())
        assert witness.exists(), "the file is harmless, and proves nothing"


class Program:
    """What touches a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._witness}",)


def test_a_folder_of_checkpoints_that_is_not_there(data_of: DataOf, refused: Refused, tmp_path: Path) -> None:
    words = ["--dataset", "camelyon", "--data_dir", data_of("camelyon"), "--checkpoint_dir", tmp_path / "none"]
    for flags in (["--test"], LOADS):
        assert refused(*words, *flags) == f"--checkpoint_dir: {tmp_path / 'none'}: no such folder"


def test_checkpoints_without_a_word_of_what_to_take_from_them(camelyon: Published, refused: Refused) -> None:
    assert refused(*camelyon.words).startswith("--checkpoint_dir: it needs --test, or one of the --load flags")


@pytest.mark.parametrize("part", ["aggregator", "student"])
def test_what_is_to_be_loaded_and_is_not_there(data_of: DataOf, refused: Refused, tmp_path: Path, part: str) -> None:
    line = refused("--dataset", "camelyon", "--data_dir", data_of("camelyon"), f"--load_pretrained_{part}")
    assert line.startswith(f"{tmp_path / 'refused' / part}: no finished {part} here: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_support_size_that_no_domain_can_fill(data_of: DataOf, refused: Refused, name: str) -> None:
    line = refused("--dataset", name, "--data_dir", data_of(name), "meta.support_size=500")
    found = re.fullmatch(r"meta\.support_size: 500 images .* \(the largest: (\d+)\): choose at most (\d+)", line)
    assert found is not None
    assert int(found[2]) == int(found[1]) - 1


@pytest.mark.parametrize("name", NAMES)
def test_more_experts_than_domains(data_of: DataOf, refused: Refused, name: str) -> None:
    line = refused("--dataset", name, "--data_dir", data_of(name), "experts.count=40")
    assert line.startswith("experts.count: 40 experts need as many source domains, the data set has ")


# Images that are cut short, met when training is under way

CUT_SHORT = "cannot be read as an image: "


@pytest.fixture
def damaged(wilds_root: WildsRoot, tmp_path: Path) -> Callable[[str, int], Path]:
    """A copy of camelyon in which an image of a split is cut short; returns that image."""

    def cut(split: str, number: int) -> Path:
        folder = wilds_root.copy("camelyon", tmp_path / "data")
        subset = stock_subset("camelyon", tmp_path / "data", split)
        path: Path = folder / subset.dataset._input_array[subset.indices[number]]
        whole = path.read_bytes()
        path.unlink()  # it is a link to the whole one
        path.write_bytes(whole[: len(whole) // 2])
        return path

    return cut


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_cut_short_ends_the_training_of_an_expert(
    damaged: Callable[[str, int], Path], wilds_root: WildsRoot, call: Call, tmp_path: Path, workers: int
) -> None:
    path, folder = damaged("train", 30), tmp_path / "run"
    words = ["--dataset", "camelyon", "--data_dir", tmp_path / "data", "--run_dir", folder, *ONE_STEP, f"data.workers={workers}"]
    words += ["experts.count=2", "experts.training.duration=1 epoch"]
    ended = [call("train_single_expert.py", "--expert_idx", number, *words) for number in range(2)]
    (bad,) = (number for number in range(2) if ended[number].status != 0)
    assert refusal(ended[bad]).startswith(f"{path}: {CUT_SHORT}")
    assert trained(folder) == [f"experts/expert_{1 - bad:02d}"]


def test_an_image_cut_short_inside_an_experts_process_is_told_by_the_run(
    damaged: Callable[[str, int], Path], call: Call, tmp_path: Path
) -> None:
    path, folder = damaged("val", 7), tmp_path / "run"
    words = ["--dataset", "camelyon", "--data_dir", tmp_path / "data", "--run_dir", folder, *ONE_STEP, "experts.count=2"]
    line = refusal(call("run.py", *words))
    assert line.startswith("expert 0 failed with status 2, and 1 more; the finished ones are kept. The end of ")
    assert "step 1/1 " in line
    assert f"error: {path}: {CUT_SHORT}" in line


def test_an_image_cut_short_ends_the_training_of_the_student(
    damaged: Callable[[str, int], Path], runs: Runs, tmp_path: Path
) -> None:
    path, folder = damaged("val", 7), tmp_path / "run"
    shutil.copytree(runs.folder("camelyon"), folder, copy_function=os.link)
    for stage in ("student", "meta"):
        shutil.rmtree(folder / stage)
    for file in ("model.json", "results.jsonl"):
        (folder / file).unlink()
    before = weights(folder)
    ended = end(start("run.py", "--run_dir", folder, "--data_dir", tmp_path / "data", "data.workers=2"))
    assert refusal(ended).startswith(f"{path}: {CUT_SHORT}")
    assert "aggregator: already finished" in ended.out
    assert weights(folder) == before
    assert not (folder / "student" / "manifest.json").exists()
