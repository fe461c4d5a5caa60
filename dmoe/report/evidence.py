"""What a page shows of a finished run beside numbers: attention of the aggregator, images with predictions, training
curves, what experts inside the student are chosen for."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dmoe.adaptation import Adapter
from dmoe.data.base import DomainSplit
from dmoe.model import load_as
from dmoe.models.aggregator import Aggregator
from dmoe.models.student import Student
from dmoe.report.pictures import png_of, spread_out
from dmoe.report.selection_evidence import gather_selection
from dmoe.report.shown import MOST_EXAMPLES, curves_of
from dmoe.run import Run
from dmoe.testing import plain_student

DOMAINS_WITH_EXAMPLES = 8
DOMAINS_SHOWN = 30
LOOKED_AT = 256
"""Images of a domain among which examples are sought, and over which attention is averaged; the support images at least."""

MOST_DOMAINS_NAMED = 6
"""Source domains in the name of an expert; of the others the number is told."""


@torch.no_grad()
def gather(run: Run, *, split: str = "target") -> dict[str, Any]:
    """The content of ``evidence.json``: plain data, as :func:`dmoe.report.shown.read_evidence` reads it.

    Raises:
        UserError: something of the run is missing or damaged.
    """
    curves = {stage: [list(point) for point in curve] for stage, curve in curves_of(run.folder.path).items()}
    if run.config.trains_one:
        alone, name = plain_student(run), "The network"
        looks: dict[str, Any] = {"attention": None, "examples": []}
    else:
        adapter = load_as(run.folder, run.config, device=run.device)
        adapter.ranges = None  # nothing to warn of: nobody acts on these predictions
        alone, name = adapter.student, "The student, before adapting,"
        looks = _of_adapting(run, adapter, split)
    size = run.config.evaluation.batch_size
    selection = gather_selection(alone.features, run.dataset, network=name, split=split, batch_size=size)
    return {**looks, "curves": curves, "selection": selection}


def _of_adapting(run: Run, adapter: Adapter, split: str) -> dict[str, Any]:
    """Attention and examples."""
    plain = plain_student(run)
    attention, examples = [], []
    domains = run.dataset.splits[split]
    shown = spread_out(list(domains.members), DOMAINS_SHOWN)
    with_examples = spread_out(shown, DOMAINS_WITH_EXAMPLES)
    each = MOST_EXAMPLES // len(with_examples)
    for domain in shown:
        images = domains.images(domains.members[domain][: max(LOOKED_AT, run.config.support_size)])
        weights = attention_to_experts(adapter, images, batch_size=run.config.evaluation.batch_size)
        if weights is not None:
            attention.append((domains.domain_names[domain], weights))
        if domain in with_examples and run.dataset.task.kind != "regression":  # values are neither right nor wrong
            examples += list(_examples(run, domains, domain, images, plain, adapter, count=each))
    return {
        "attention": {
            "experts": expert_names(run),
            "domains": [name for name, _ in attention],
            "weights": [[round(weight, 5) for weight in weights] for _, weights in attention],
        }
        if attention
        else None,
        "examples": examples,
    }


def attention_to_experts(adapter: Adapter, images: Tensor, *, batch_size: int) -> list[float] | None:
    """Which share of the aggregator's attention falls on each expert, for images ``[B, C, H, W]``; None: it has none.

    The mean over images, heads, blocks and the tokens that ask; the shares add up to 1.
    """
    aggregator = adapter.aggregator
    if not isinstance(aggregator, Aggregator) or not aggregator.blocks:
        return None
    tokens = torch.cat([adapter.experts(part.to(adapter.student.device)) for part in images.split(batch_size)])
    found: list[float] = aggregator.attention(tokens).mean(dim=(0, 1, 2, 3)).tolist()
    return found


def expert_names(run: Run) -> list[str]:
    """What each expert learned from."""
    names = run.source.group_names
    found = []
    for expert in range(run.config.experts.count):
        own = [names.get(domain, str(domain)) for domain, group in run.groups.items() if group == expert]
        left = len(own) - MOST_DOMAINS_NAMED
        found.append("; ".join(own[:MOST_DOMAINS_NAMED]) + (f" and {left} more" if left > 0 else ""))
    return found


def chosen(changed: Tensor, count: int) -> list[int]:
    """Up to ``count`` images: half of them the first whose verdict changed ``[n]``, the others the first that did not."""
    first, same = changed.nonzero().flatten().tolist(), (~changed).nonzero().flatten().tolist()
    of_changed = min(len(first), max(count // 2, count - len(same)))
    return sorted(first[:of_changed] + same[: count - of_changed])


def _examples(
    run: Run, split: DomainSplit, domain: int, images: Tensor, plain: Student, adapter: Adapter, *, count: int
) -> Iterator[dict[str, str]]:
    task, names = run.dataset.task, list(run.dataset.class_names)
    labels = split.labels[split.members[domain][: len(images)]].long()
    adapted = adapter.adapt(images[: run.config.support_size])
    before, after = (task.predictions(student.logits(images)).cpu() for student in (plain, adapted))

    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    for place in chosen((before == labels) != (after == labels), count):
        verdict = {key: name(int(of[place])) for key, of in (("truth", labels), ("before", before), ("after", after))}
        yield {"domain": split.domain_names[domain], "image": png_of(images[place], run.dataset.transform), **verdict}
