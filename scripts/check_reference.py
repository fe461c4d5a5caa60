"""Recompute a folder of reference tensors with the package's own code and say how far off each file is.

The files hold inputs, weights and, as ``out.*``, what the public Meta-DMoE code made of them in float64; tests/reference
has a set. Their kind is in their name: aggregator, masking, meta_step_*, meta_two_epochs, eval_*. Every ``out.*`` tensor has to
be reproduced, and the meta steps by both gradient methods. Exit status: 0 all hold, 1 some do not, 2 nothing to check.
"""

import argparse
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.adaptation import Adapter
from dmoe.artifacts import load_into, load_tensors, under_prefix, with_prefix
from dmoe.config import OptimizerConfig
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.errors import UserError
from dmoe.evaluation import evaluate
from dmoe.meta.gradient import GradientMethod, distillation_loss
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way
from dmoe.models.aggregator import Aggregator
from dmoe.models.expert_pool import ExpertPool, without_own_expert
from dmoe.models.networks import Network, PooledDenseNet
from dmoe.models.student import Student
from dmoe.optimizers import ScheduledAdam
from dmoe.protocols import Protocol
from dmoe.published import AGGREGATOR, STUDENT
from dmoe.tasks import Task

RTOL, ATOL = 1e-9, 1e-12
ATOL_AFTER_ADAM = 1e-11
"""Entries whose gradient is mathematically zero hold rounding noise, which Adam divides by 1e-8."""

HEADS = 4
"""Of the aggregator's attention; no tensor tells it."""

EPOCHS = 2
"""Of meta_two_epochs."""


@dataclass(frozen=True)
class Case:
    """How one file came out.

    Attributes:
        name: the file's, and the gradient method where there is a choice.
        error: largest absolute error of any of its tensors.
        fault: what is wrong, or None.
    """

    name: str
    error: float
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.name:<52} {self.error:8.1e}  {f'FAILED: {self.fault}' if self.fault else 'ok'}"


class Reference(dict[str, Tensor]):
    """The tensors of one file."""

    def __missing__(self, name: str) -> Tensor:
        raise UserError(f"{name} is not in the file")


def check_folder(folder: Path) -> list[Case]:
    """Check every safetensors file of a folder.

    Raises:
        UserError: there is no such folder, it holds no such file, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = {path.stem: Reference(load_tensors(path)[0]) for path in sorted(folder.glob("*.safetensors"))}
    if not files:
        raise UserError(f"{folder}: it holds no safetensors files")
    return [case for name, file in files.items() for case in check_file(name, file)]


def check_file(name: str, file: Reference) -> list[Case]:
    """Recompute one file: a case, or one for each gradient method."""
    for kind, recompute in KINDS.items():
        if name.startswith(kind):
            methods = get_args(GradientMethod) if kind.startswith("meta_") else ("double_backward",)
            titles = [f"{name} ({method})" if len(methods) > 1 else name for method in methods]
            return [_check(t, file, partial(recompute, name, file, m)) for t, m in zip(titles, methods, strict=True)]
    return [Case(name, math.nan, f"no check is known for a file of this name; known: {', '.join(KINDS)}")]


def _check(name: str, file: Reference, recompute: Callable[[], dict[str, Tensor]]) -> Case:
    """Compare what is computed with every ``out.*`` tensor of the file, and the other way round."""
    try:
        computed = recompute()
    except (UserError, RuntimeError, ValueError, IndexError) as problem:
        return Case(name, math.nan, " ".join(str(problem).split())[:200])
    expected = {key: tensor.double() for key, tensor in file.items() if key.startswith("out.")}
    for keys, fault in (
        (computed.keys() - expected.keys(), "is not in the file"),
        (expected.keys() - computed.keys(), "is unknown"),
    ):
        if keys:
            return Case(name, math.nan, f"{min(keys)} {fault}")
    largest, worst, worst_excess = 0.0, None, 1.0
    for key, tensor in computed.items():
        if tensor.shape != expected[key].shape:
            return Case(name, math.nan, f"{key} is {list(expected[key].shape)} in the file, computed as {list(tensor.shape)}")
        error = (tensor.double() - expected[key]).abs().nan_to_num(nan=math.inf)
        atol = ATOL_AFTER_ADAM if "two_epochs" in name or ".after_step." in key else ATOL
        excess = (error / (atol + RTOL * expected[key].abs())).nan_to_num(nan=math.inf).max().item()
        largest = max(largest, error.max().item())
        if excess > worst_excess:
            worst, worst_excess = f"{key} is off by {error.max():.1e}", excess
    return Case(name, largest, worst)


def _aggregator_outputs(name: str, file: Reference, method: GradientMethod) -> dict[str, Tensor]:
    aggregator = _aggregator(file).eval()
    with torch.no_grad():
        return {"out.get_feat": aggregator(file["x"]), "out.forward": aggregator.logits(file["x"])}


def _masked_tokens(name: str, file: Reference, method: GradientMethod) -> dict[str, Tensor]:
    return {"out.masked": without_own_expert(file["feat"].transpose(1, 2), file["mask"])}  # [B, D, N] -> [B, N, D]


def _meta_step(name: str, file: Reference, method: GradientMethod) -> dict[str, Tensor]:
    learner = _learner(file, method)
    student, aggregator, episode = learner.student, learner.aggregator, _episode(file, "", ExpertPool(_experts(file)))
    target = aggregator(episode.tokens).detach()
    unadapted = Student(features=student.features, head=student.head, task=_task(file))
    adapted = unadapted.adapted(episode.support, target, inner_lr=file["ilr"].item())
    out = {
        "masked_feats": episode.tokens,
        "t_out": target,
        "query_logits_before": unadapted.logits(episode.query),
        "query_logits_after": adapted.logits(episode.query),
        **with_prefix("adapted.features", adapted.parameters()),
    }
    values = learner.add_gradients([episode])
    out |= {key: torch.tensor(values[key], dtype=torch.float64) for key in ("inner_loss", "query_loss")}
    out |= with_prefix("grad", _published(file, learner, lambda parameter: parameter.grad))
    for parameter in (*student.parameters(), *aggregator.parameters()):
        parameter.grad = None
    learner.update(0, [episode], *_optimizers(file, learner, batches=1, decay=1.0))
    out |= with_prefix("after_step", _published(file, learner, Tensor.detach))
    return with_prefix("out", out)


def _meta_epochs(name: str, file: Reference, method: GradientMethod) -> dict[str, Tensor]:
    learner, pool = _learner(file, method), ExpertPool(_experts(file))
    episodes = [_episode(file, f"b{number}.", pool) for number in range(_count(file, "b"))]
    adams = _optimizers(file, learner, batches=len(episodes), decay=file["decay_rate"].item())
    history = []
    for step in range(EPOCHS * len(episodes)):
        if step % len(episodes) == 0:
            for adam in adams:
                adam.restart()
        history.append(learner.update(step, [episodes[step % len(episodes)]], *adams))
    out = with_prefix("final", _published(file, learner, Tensor.detach))
    for key in ("inner_loss", "query_loss"):
        out[key] = torch.tensor([values[key] for values in history], dtype=torch.float64)
    return with_prefix("out", out)


class StoredDomains(DomainSplit):
    """The domains d0, d1, ... of a file, batch after batch; ``sizes`` by the name of the batch."""

    def __init__(self, file: Reference) -> None:
        domains = [f"d{number}" for number in range(_count(file, "d"))]
        batches = [f"{d}.b{number}" for d in domains for number in range(_count(under_prefix(d, file), "b"))]
        self.sizes = {batch: len(file[f"{batch}.x"]) for batch in batches}
        self._images = torch.cat([file[f"{batch}.x"] for batch in batches])
        self.labels = torch.cat([file[f"{batch}.y"] for batch in batches])
        self.domains = torch.cat([file[f"{batch.split('.')[0]}.id"].expand(size) for batch, size in self.sizes.items()])

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self._images[index]

    def as_target(self, name: str, task: Task) -> DomainDataset:
        """A data set of nothing else."""
        channels, height, width = self._images.shape[1:]
        transform = ImageTransform(image_shape=(channels, height, width))
        return DomainDataset(name=name, splits={"target": self}, task=task, transform=transform, class_names=(), fingerprint="")


def _adaptation(name: str, file: Reference, method: GradientMethod) -> dict[str, Tensor]:
    student, task, split = _network(file), _task(file), StoredDomains(file)
    adapter = Adapter(
        features=student.features,
        head=student.head,
        experts=_experts(file),
        aggregator=_aggregator(file),
        inner_lr=file["ilr"].item(),
        expert_batch_norm="batch" if "bn_batch_stats" in name else "running",
        task=task,
    )
    support_size = split.sizes["d0.b0"]
    found = evaluate(adapter, split.as_target(name, task), "target", Protocol(support_size), batch_size=support_size)
    metrics = {"acc": found.overall["accuracy"]}
    if task.kind == "multiclass":
        metrics |= {"mean_domain_acc": found.mean, "macro_f1": found.overall["macro_f1"]}
    out = {key: torch.tensor(value, dtype=torch.float64) for key, value in metrics.items()}
    for batch, prediction in zip(split.sizes, found.predictions.split(list(split.sizes.values())), strict=True):
        images, domain = file[f"{batch}.x"], batch.split(".")[0]
        if batch.endswith(".b0"):
            target, adapted = adapter.target(images), adapter.adapt(images)
            with torch.no_grad():
                out[f"{domain}.inner_loss"] = distillation_loss(adapter.student.features(images), target)
            out |= {f"{domain}.t_out": target, **with_prefix(f"{domain}.adapted.features", adapted.parameters())}
        out |= {f"{batch}.pred": prediction, f"{batch}.logits": adapted.logits(images)}
        out[f"{batch}.logits_unadapted"] = adapter.student.logits(images)
    return with_prefix("out", out)


KINDS: Mapping[str, Callable[[str, Reference, GradientMethod], dict[str, Tensor]]] = {
    "aggregator": _aggregator_outputs,
    "masking": _masked_tokens,
    "meta_step_": _meta_step,
    "meta_two_epochs": _meta_epochs,
    "eval_": _adaptation,
}
"""What recomputes a file, by how its name begins."""


def _features(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The ResNet-like or, by its names, DenseNet-like extractor of these tensors."""
    tensors = Reference(tensors)
    densenet = any(name.startswith("0.conv0.") for name in tensors)
    first, second = (tensors[f"{name}.weight"] for name in (("0.conv0", "0.conv1") if densenet else ("0", "3")))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv0"] = nn.Conv2d(first.shape[1], first.shape[0], first.shape[-1], stride=2, padding=1, bias=False)
    layers.update(norm0=nn.BatchNorm2d(first.shape[0]), relu0=nn.ReLU())
    layers["conv1"] = nn.Conv2d(second.shape[1], second.shape[0], second.shape[-1], stride=2, padding=1, bias=False)
    layers["norm5"] = nn.BatchNorm2d(second.shape[0])
    features: nn.Module
    if densenet:
        features = PooledDenseNet(nn.Sequential(layers), last_relu=False)
    else:
        features = nn.Sequential(*layers.values(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    load_into(features.double(), tensors, where="features")
    return features.eval()


def _network(file: Reference) -> Network:
    weight = file["student.classifier.0.weight"]
    network = Network(features=_features(under_prefix("student.features", file)), head=nn.Linear(weight.shape[1], weight.shape[0]))
    load_into(network.double(), STUDENT.renamed(under_prefix("student", file), where="student"), where="student")
    return network


def _experts(file: Reference) -> list[nn.Module]:
    return [_features(under_prefix(f"expert.{number}.features", file)) for number in range(_count(file, "expert."))]


def _aggregator(file: Reference) -> Aggregator:
    outputs, width = file["aggregator.mlp.1.weight"].shape
    depth = _count(file, "aggregator.transformer.layers.")
    aggregator = Aggregator(width=width, num_outputs=outputs, depth=depth, heads=HEADS, dropout=0.1).double()
    load_into(aggregator, AGGREGATOR.renamed(under_prefix("aggregator", file), where="aggregator"), where="aggregator")
    return aggregator


def _task(file: Reference) -> Task:
    outputs = len(file["student.classifier.0.bias"])
    return Task("binary" if outputs == 1 else "multiclass", num_outputs=outputs)


def _learner(file: Reference, method: GradientMethod) -> MetaLearner:
    student, aggregator = _network(file), _aggregator(file)
    return MetaLearner(student=student, aggregator=aggregator, task=_task(file), inner_lr=file["ilr"].item(), way=Way(method))


def _episode(file: Reference, prefix: str, pool: ExpertPool) -> EpisodeBatch:
    support, query, labels, own = (file[prefix + name] for name in ("x_sup", "x_que", "y_que", "mask"))
    return EpisodeBatch(support=support, tokens=without_own_expert(pool(support), own), query=query, labels=labels)


def _optimizers(file: Reference, learner: MetaLearner, *, batches: int, decay: float) -> tuple[ScheduledAdam, ScheduledAdam]:
    def adam(parameters: list[nn.Parameter], lr: Tensor) -> ScheduledAdam:
        config = OptimizerConfig(lr=lr.item(), schedule="exponential", decay_per_epoch=decay)
        return ScheduledAdam(parameters, config, steps=EPOCHS * batches, steps_per_epoch=batches)

    return adam(learner.student_parameters, file["slr"]), adam(learner.aggregator_parameters, file["tlr"])


def _published(file: Reference, learner: MetaLearner, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """A value of every parameter that has one, under its published name."""
    found = {}
    for part, module, naming in (("student", learner.student, STUDENT), ("aggregator", learner.aggregator, AGGREGATOR)):
        for published in under_prefix(part, file):
            parameter = dict(module.named_parameters()).get(naming.ours(published) or published)
            if parameter is not None and (tensor := value(parameter)) is not None:
                found[f"{part}.{published}"] = tensor
    return found


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers, from 0, follow ``prefix`` at the start of the names."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder laid out like tests/reference")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    try:
        cases = check_folder(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(*cases, sep="\n")
    return 1 if any(case.fault for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
