"""Every fast path against the plain one: how far apart their numbers are, in three precisions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.adaptation import Adapter
from dmoe.meta.gradient import GradientMethod, meta_gradient
from dmoe.models.expert_pool import ExpertPool
from dmoe.models.folding import Folding
from dmoe.models.networks import Network
from scripts.benchmarks.inputs import CLASSES, INNER_LR, TASK, Setting, as_delivered, new_aggregator
from scripts.benchmarks.measuring import Place, autocast

BACKBONES = ("resnet18", "resnet50", "densenet121", "timm:vit_small_patch16_224")
PRECISIONS = ("float64", "float32", "bfloat16")
BAR = 1e-10
"""Of the relative difference, in float64."""

SIZE, SUPPORT, QUERY, EXPERTS = 64, 6, 4, 3
Found = Mapping[str, Tensor]


class Case:
    """One backbone's networks and images in one precision; the numbers are the same in all of them, before rounding."""

    def __init__(self, backbone: str, precision: str, device: torch.device, size: int) -> None:
        torch.manual_seed(0)
        dtype = torch.float64 if precision == "float64" else torch.float32
        setting = Setting(backbone, size, SUPPORT, QUERY, EXPERTS)
        self.student, *self.experts = (settled(setting.network()).to(device, dtype) for _ in range(EXPERTS + 1))
        self.teacher = new_aggregator(self.student.width, torch.device("cpu")).to(device, dtype)
        self.support, self.query = (torch.randn(count, 3, size, size).to(device, dtype) for count in (SUPPORT, QUERY))
        self.target = torch.randn(SUPPORT, self.student.width).to(device, dtype)
        self.labels = torch.randint(CLASSES, (QUERY,)).to(device)


def settled(network: Network) -> Network:
    """With batch-norm statistics as if it had seen something."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    return network


def gradients(case: Case, method: GradientMethod, chunk_size: int | None = None, *, fast: bool = True) -> Found:
    """The three gradients of an episode. ``fast``: batch-norm folded into the convolutions, channels last."""
    folding = Folding(case.student.features)
    buffers = dict(case.student.features.named_buffers())
    arrange: Callable[[Tensor], Tensor] = as_delivered if fast else Tensor.contiguous
    found = meta_gradient(
        features=folding.features if fast else lambda p, x: functional_call(case.student.features, (dict(p), buffers), (x,)),
        prepare=folding.prepare if fast else dict,
        head=lambda q, f: functional_call(case.student.head, dict(q), (f,)),
        loss=TASK.loss,
        theta=dict(case.student.features.named_parameters()),
        w=dict(case.student.head.named_parameters()),
        target=case.target,
        support=arrange(case.support),
        query=arrange(case.query),
        labels=case.labels,
        inner_lr=INNER_LR,
        method=method,
        chunk_size=chunk_size,
    )
    return {"theta": flat(found.theta.values()), "w": flat(found.w.values()), "target": found.target}


def adapted(case: Case) -> Found:
    """The step of an adapted student, by the product."""
    adapter = Adapter(
        features=case.student.features,
        head=case.student.head,
        experts=[expert.features for expert in case.experts],
        aggregator=case.teacher,
        inner_lr=INNER_LR,
        task=TASK,
    )
    after = adapter.adapt(as_delivered(case.support)).parameters()
    return {"step": flat(after[name] - value for name, value in case.student.features.named_parameters())}


def plainly_adapted(case: Case) -> Found:
    parameters = list(case.student.features.parameters())
    with torch.no_grad():
        target = case.teacher(plain_tokens(case)["tokens"])
    after = torch.autograd.grad((case.student.features(case.support) - target).square().mean(), parameters)
    return {"step": flat((p - INNER_LR * g) - p for p, g in zip(parameters, after, strict=True))}


def tokens(case: Case) -> Found:
    return {"tokens": ExpertPool(expert.features for expert in case.experts)(as_delivered(case.support))}


def plain_tokens(case: Case) -> Found:
    with torch.no_grad():
        return {"tokens": torch.stack([expert.features(case.support) for expert in case.experts], dim=1)}


def plain_gradients(case: Case) -> Found:
    return gradients(case, "double_backward", fast=False)


PATHS: Mapping[str, tuple[Callable[[Case], Found], Callable[[Case], Found]]] = {
    "meta-gradient, forward over reverse in chunks of 4": (
        lambda case: gradients(case, "forward_over_reverse", 4),
        plain_gradients,
    ),
    "meta-gradient, reverse over reverse in chunks of 4": (
        lambda case: gradients(case, "reverse_over_reverse", 4),
        plain_gradients,
    ),
    "meta-gradient, double backward": (lambda case: gradients(case, "double_backward"), plain_gradients),
    "step of an adaptation": (adapted, plainly_adapted),
    "tokens": (tokens, plain_tokens),
}
"""Fast and plain. The three ways to the meta-gradient have batch-norm folded into the convolutions; the plain one has not."""


def rows(place: Place, *, backbones: Sequence[str] = BACKBONES, size: int = SIZE) -> list[dict[str, Any]]:
    """A row a path and precision: the largest relative difference, over backbones and over what the path gives."""
    device = torch.device(place.device)
    torch.set_num_threads(place.threads)
    differences: dict[tuple[str, str], dict[str, float]] = {(path, p): {} for p in PRECISIONS for path in PATHS}
    rounding: dict[tuple[str, str], dict[str, float]] = {key: {} for key in differences}
    for backbone in backbones:
        exact: dict[str, Found] = {}
        for precision in PRECISIONS:
            case, said = Case(backbone, precision, device, size), {}
            with autocast(device, enabled=precision == "bfloat16"):
                for path, (fast, plain) in PATHS.items():
                    if plain not in said:
                        said[plain] = plain(case)
                    exact.setdefault(path, said[plain])
                    differences[path, precision][backbone] = difference(fast(case), said[plain])
                    rounding[path, precision][backbone] = difference(said[plain], exact[path])
    return [
        _row(path, precision, by_backbone, max(rounding[path, precision].values()), place)
        for (path, precision), by_backbone in differences.items()
    ]


def _row(path: str, precision: str, by_backbone: Mapping[str, float], rounding: float, place: Place) -> dict[str, Any]:
    largest = max(by_backbone, key=lambda backbone: by_backbone[backbone])
    bar = BAR if precision == "float64" else None
    return {
        "name": f"agreement, {path}, {precision}{' autocast' if precision == 'bfloat16' else ''}",
        "what": f"largest relative difference from the plain way, at {largest}; against: the plain way's own from float64",
        "ours": by_backbone[largest],
        "baseline": rounding if precision != "float64" else None,
        "unit": "relative difference",
        "ratio": by_backbone[largest] / rounding if rounding else None,
        "bar": bar,
        "better": "below",
        "holds": None if bar is None else by_backbone[largest] <= bar,
        "by_backbone": dict(by_backbone),
        "machine": {**place.machine, "precision": precision},
    }


def difference(one: Found, other: Found) -> float:
    """The largest of the parts' relative differences."""
    return max(float((one[n].double() - other[n].double()).norm() / other[n].double().norm()) for n in other)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])
