"""Every fast path against the plain one: how far apart their numbers are, in three precisions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.adaptation import Adapter
from dmoe.meta.gradient import GradientMethod, meta_gradient
from dmoe.meta.learner import Way
from dmoe.models.expert_pool import ExpertPool
from dmoe.models.folding import Folding
from dmoe.models.networks import Network, in_layout
from dmoe.precision import Precision, computing_in, not_coarse
from scripts.benchmarks.inputs import CLASSES, INNER_LR, TASK, Setting, as_delivered, new_aggregator
from scripts.benchmarks.measuring import Place

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
        self.precision: Precision = "bfloat16" if precision == "bfloat16" else "float32"
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
    """The three gradients of an episode. ``fast``: as a learner has them, batch-norm folded and laid out in memory for the way."""
    folding = Folding(case.student.features)
    buffers = dict(case.student.features.named_buffers())
    layout = Way(method, chunk_size).layout if fast else torch.contiguous_format
    in_layout(case.student, layout)
    found = meta_gradient(
        features=(lambda p, x: not_coarse(folding.features(p, x)))
        if fast
        else (lambda p, x: functional_call(case.student.features, (dict(p), buffers), (x,))),
        prepare=folding.prepare if fast else dict,
        head=lambda q, f: functional_call(case.student.head, dict(q), (f,)),
        loss=TASK.loss,
        theta=dict(case.student.features.named_parameters()),
        w=dict(case.student.head.named_parameters()),
        target=case.target,
        support=case.support.contiguous(memory_format=layout),
        query=case.query.contiguous(memory_format=layout),
        labels=case.labels,
        inner_lr=INNER_LR,
        method=method,
        chunk_size=chunk_size,
    )
    return {"theta": flat(found.theta.values()), "w": flat(found.w.values()), "target": found.target}


def adapted(case: Case, *, many: bool = False) -> Found:
    """The step of an adapted student, by the product; ``many``: of several that are adapted at once."""
    adapter = Adapter(
        features=in_layout(case.student, torch.channels_last).features,
        head=case.student.head,
        experts=[in_layout(expert, torch.channels_last).features for expert in case.experts],
        expert_precision=case.precision,
        aggregator=case.teacher,
        inner_lr=INNER_LR,
        task=TASK,
    )
    images = as_delivered(case.support)
    with computing_in("float32", images.device):  # the step itself always is
        student = adapter.adapt_many(torch.stack([images.flip(0), images]))[1] if many else adapter.adapt(images)
    after = student.parameters()
    return {"step": flat(after[name] - value for name, value in case.student.features.named_parameters())}


def plainly_adapted(case: Case) -> Found:
    parameters = list(in_layout(case.student, torch.contiguous_format).features.parameters())
    tokens = not_coarse(plain_tokens(case)["tokens"])
    with computing_in("float32", tokens.device):
        target = case.teacher(tokens).detach()
        after = torch.autograd.grad((case.student.features(case.support) - target).square().mean(), parameters)
    return {"step": flat((p - INNER_LR * g) - p for p, g in zip(parameters, after, strict=True))}


def pooled_tokens(case: Case) -> Found:
    pool = ExpertPool((in_layout(expert, torch.channels_last).features for expert in case.experts), precision=case.precision)
    return {"tokens": pool(as_delivered(case.support))}


def plain_tokens(case: Case) -> Found:
    experts = [in_layout(expert, torch.contiguous_format) for expert in case.experts]
    with torch.no_grad():
        return {"tokens": torch.stack([expert.features(case.support) for expert in experts], dim=1)}


@torch.no_grad()
def lost_by_storing(case: Case, dtype: torch.dtype) -> float:
    """The relative difference of target features, where tokens are stored in a shorter type."""
    found = plain_tokens(case)["tokens"]
    return difference({"target": case.teacher(found.to(dtype).float())}, {"target": case.teacher(found)})


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
    "step of one of many adaptations at once": (lambda case: adapted(case, many=True), plainly_adapted),
    "tokens": (pooled_tokens, plain_tokens),
}
"""Fast and plain: the three ways to the meta-gradient have batch-norm folded into the convolutions; the plain one has not."""


def rows(place: Place, *, backbones: Sequence[str] = BACKBONES, size: int = SIZE) -> list[dict[str, Any]]:
    """A row a path and precision: the largest relative difference, over backbones and over what the path gives."""
    device = torch.device(place.device)
    torch.set_num_threads(place.threads)
    differences: dict[tuple[str, str], dict[str, float | None]] = {(path, p): {} for p in PRECISIONS for path in PATHS}
    rounding: dict[tuple[str, str], dict[str, float]] = {key: {} for key in differences}
    stored: dict[str, dict[str, float]] = {"float16": {}, "bfloat16": {}}
    for backbone in backbones:
        exact: dict[str, Found] = {}
        for precision in PRECISIONS:
            case, said = Case(backbone, precision, device, size), {}
            with computing_in(case.precision, device):
                for path, (fast, plain) in PATHS.items():
                    if plain not in said:
                        said[plain] = plain(case)
                    exact.setdefault(path, said[plain])
                    differences[path, precision][backbone] = _of_fast(fast, case, said[plain])
                    rounding[path, precision][backbone] = difference(said[plain], exact[path])
            if precision == "float32":
                for storage, kept in stored.items():
                    kept[backbone] = lost_by_storing(case, getattr(torch, storage))
    found = [
        _row(path, precision, by_backbone, max(rounding[path, precision].values()), place)
        for (path, precision), by_backbone in differences.items()
    ]
    return found + [_stored_row(storage, kept, place) for storage, kept in stored.items()]


def _stored_row(storage: str, by_backbone: Mapping[str, float], place: Place) -> dict[str, Any]:
    found = _row("target features from stored tokens", storage, by_backbone, 0.0, place)
    largest = max(by_backbone, key=lambda backbone: by_backbone[backbone])
    what = f"largest relative difference from float32 tokens, at {largest}"
    return {**found, "name": f"agreement, target features from tokens stored as {storage}", "what": what, "baseline": None}


def _of_fast(fast: Callable[[Case], Found], case: Case, plain: Found) -> float | None:
    """The difference, or None where torch has not what the path needs in this precision."""
    try:
        return difference(fast(case), plain)
    except (RuntimeError, NotImplementedError):
        return None


def _row(path: str, precision: str, by_backbone: Mapping[str, float | None], rounding: float, place: Place) -> dict[str, Any]:
    known = {backbone: value for backbone, value in by_backbone.items() if value is not None}
    worst = max(known.values(), default=math.nan)
    failed = [backbone for backbone in by_backbone if backbone not in known]
    where = f", at {max(known, key=lambda backbone: known[backbone])}" if known else ""
    where += f"; torch cannot do it with {', '.join(failed)}" if failed else ""
    bar = BAR if precision == "float64" else None
    return {
        "name": f"agreement, {path}, {precision}{' autocast' if precision == 'bfloat16' else ''}",
        "what": f"largest relative difference from the plain way{where}; beside it the plain way's own from float64",
        "ours": worst,
        "baseline": rounding if precision != "float64" else None,
        "unit": "relative difference",
        "ratio": worst / rounding if rounding else None,
        "bar": bar,
        "better": "below",
        "holds": None if bar is None else not failed and worst <= bar,
        "by_backbone": dict(by_backbone),
        "machine": {**place.machine, "precision": precision},
    }


def difference(one: Found, other: Found) -> float:
    """The largest of the parts' relative differences."""
    return max(float((one[n].double() - other[n].double()).norm() / other[n].double().norm()) for n in other)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])
