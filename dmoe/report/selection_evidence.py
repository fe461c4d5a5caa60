"""Which experts inside a finished network patches of images go to, found by letting it look at some.

Notation: B images of n patches, E experts of a layer, of which k are chosen for a patch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.models.sparse import Routing, routings, sparse_layers
from dmoe.randomness import generator
from dmoe.report.pictures import png_of, spread_out
from dmoe.report.selection import MOST_PATCHES, MOST_PICTURES, Shares, agreement, information

DOMAINS_LOOKED_AT = 30
IMAGES_LOOKED_AT = 64
"""Of a domain, drawn from all of its images; patches of an image are many."""


class Chosen(NamedTuple):
    """What the patches of images chose in a layer.

    Attributes:
        first: the expert that was chosen first, ``[B, n]``.
        counts: how many of its choices each expert served, of each image, ``[B, E]``.
    """

    first: Tensor
    counts: Tensor


@torch.no_grad()
def gather_selection(
    features: nn.Module, dataset: DomainDataset, *, network: str, split: str = "target", batch_size: int
) -> dict[str, Any] | None:
    """Plain data, as :func:`dmoe.report.selection.selection_from` reads it; None: the network has no sparse layer.

    Args:
        features: ``[B, C, H, W] -> [B, D]``, in eval mode.
        network: what it is called.
        split: beside source and validation domains, and whose images are drawn.
    """
    layers = sparse_layers(features)
    if not layers:
        return None
    grid = grid_of(features)
    names = [name for name in ("source", "validation") if name in dataset.splits and name != split]
    splits = {name: dataset.splits[name] for name in [*names, split]}
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in layers}
    pictures: list[dict[str, Any]] = []
    for name, images_of in splits.items():
        counts, labels = _Counts(layers), []
        domains = spread_out(list(images_of.members), DOMAINS_LOOKED_AT)
        drawn = spread_out(domains, MOST_PICTURES) if name == split and grid is not None else []
        for domain in domains:
            index = _some_of(images_of, domain)
            images = images_of.images(index)
            chosen = chosen_experts(features, images, batch_size=batch_size)
            counts.add(chosen)
            labels.append(images_of.labels[index])
            if domain in drawn:
                wanted = len(range(drawn.index(domain), MOST_PICTURES, len(drawn)))
                pictures += [_picture(dataset, images_of, index, images, chosen, one) for one in range(len(index))[:wanted]]
        classes = None if dataset.task.kind == "regression" else labels
        for layer in layers:
            spread = counts.spread(layer, classes)
            source = found[layer]["source"]["shares"] if name != "source" and "source" in found[layer] else None
            with_source = None if source is None else _rounded(agreement(spread["shares"], source))
            named = [images_of.domain_names.get(domain, str(domain)) for domain in domains]
            found[layer][name] = {"domains": named, **spread, "with_source": with_source}
    whole = grid is not None and grid[0] * grid[1] <= MOST_PATCHES
    return {
        "network": network,
        "layers": [
            {"name": name, "experts": len(layer.w1), "top_k": layer.top_k, "splits": found[name]} for name, layer in layers.items()
        ],
        "grid": grid if whole else None,
        "pictures": pictures if whole else [],
    }


def chosen_experts(features: nn.Module, images: Tensor, *, batch_size: int) -> dict[str, Chosen]:
    """By layer, what the patches of images ``[B, C, H, W]`` chose; tokens that are no patches are left out.

    A capacity is that of ``batch_size`` images at a time.
    """
    device, prefix = next(features.parameters()).device, _prefix(features)
    parts: dict[str, list[Chosen]] = {}
    for part in images.split(batch_size):
        with routings(features) as found:
            features(part.to(device))
        for name, routing in found.items():
            parts.setdefault(name, []).append(_by_image(routing, len(part), prefix))
    return {name: Chosen(*(torch.cat(each) for each in zip(*of, strict=True))) for name, of in parts.items()}


def grid_of(features: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of the patches of timm's vision transformers; None: of another network."""
    for part in features.modules():
        size = getattr(getattr(part, "patch_embed", None), "grid_size", None)
        if size is not None and hasattr(part, "num_prefix_tokens"):
            return int(size[0]), int(size[1])
    return None


def _prefix(features: nn.Module) -> int:
    """How many tokens stand before those of patches: class tokens and the like."""
    numbers = (getattr(part, "num_prefix_tokens", None) for part in features.modules())
    return next((number for number in numbers if isinstance(number, int)), 0)


def _by_image(routing: Routing, images: int, prefix: int) -> Chosen:
    experts = routing.experts.unflatten(0, (images, -1))[:, prefix:].cpu()  # [B, n, k]
    served = torch.ones_like(experts)
    if routing.served is not None:
        served = routing.served.unflatten(0, (images, -1))[:, prefix:].cpu().long()
    counts = torch.zeros(images, routing.logits.shape[1], dtype=torch.long)
    return Chosen(experts[:, :, 0], counts.scatter_add(1, experts.flatten(1), served.flatten(1)))


class _Counts:
    """Choices of the images of a split, by layer and domain."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self._found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def add(self, chosen: dict[str, Chosen]) -> None:
        """Of a domain."""
        for name, one in chosen.items():
            self._found[name].append(one.counts)

    def spread(self, layer: str, labels: list[Tensor] | None) -> dict[str, Any]:
        """Numbers of a layer; ``labels`` are classes of the images, by domain."""
        domains = torch.stack([counts.sum(dim=0) for counts in self._found[layer]])  # [domains, E]
        shares = _shares(domains)
        by_class = None
        if labels is not None:
            classes, places = torch.cat(labels).unique(return_inverse=True)
            counts = torch.zeros(len(classes), domains.shape[1], dtype=torch.long)
            by_class = information(counts.index_add(0, places, torch.cat(self._found[layer])).numpy())
        return {
            "load": _shares(domains.sum(dim=0, keepdim=True))[0],
            "shares": shares,
            "agreement": _rounded(agreement(shares)),
            "by_domain": _rounded(information(domains.numpy())),
            "by_class": _rounded(by_class),
        }


def _shares(counts: Tensor) -> Shares:
    """Counts ``[rows, E]`` as shares of their rows."""
    found = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return [[round(share, 5) for share in row] for row in found.tolist()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else min(1.0, max(0.0, round(value, 5)))


def _some_of(split: DomainSplit, domain: int) -> Tensor:
    """Numbers of some of a domain's images, the same each time."""
    members = split.members[domain]
    drawn = torch.randperm(len(members), generator=generator("expert selection", domain))[:IMAGES_LOOKED_AT]
    return members[drawn]


def _picture(
    dataset: DomainDataset, split: DomainSplit, index: Tensor, images: Tensor, chosen: dict[str, Chosen], place: int
) -> dict[str, Any]:
    truth, names = split.labels[index[place]], dataset.class_names
    if dataset.task.kind == "regression":
        said = f"{float(truth):.3g}"
    else:
        said = names[int(truth)] if int(truth) < len(names) else str(int(truth))
    return {
        "domain": split.domain_names.get(int(split.domains[index[place]]), ""),
        "truth": said,
        "image": png_of(images[place], dataset.transform),
        "chosen": [one.first[place].tolist() for one in chosen.values()],
    }
