"""Which experts inside a network patches of images go to: the numbers, and how they are read back.

Notation: E experts of a sparse layer, of which k are chosen for a patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmoe.report.checked import small_png, sure, whole
from dmoe.report.files import name_of

MOST_LAYERS = 64
MOST_SPLITS = 8
MOST_EXPERTS = 1_000
MOST_DOMAINS = 100
MOST_PATCHES = 2_000
MOST_PICTURES = 6

Shares = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Spread:
    """How patches of a split's images are shared out among the experts of a layer.

    Attributes:
        load: share of all choices that each expert works for, ``[E]``.
        shares: the same of each domain, ``[domains, E]``.
        agreement: see :func:`agreement`; None: there is one domain.
        by_domain, by_class: what expert and domain, or class, tell of one another, see :func:`information`; None: there is no
            second one.
        with_source: agreement of domains with source domains; None: these are the source domains.
    """

    load: Sequence[float]
    domains: Sequence[str]
    shares: Shares
    agreement: float | None
    by_domain: float | None
    by_class: float | None
    with_source: float | None


@dataclass(frozen=True)
class Layer:
    """A sparse layer.

    Attributes:
        experts, top_k: E and k.
        splits: by name.
    """

    name: str
    experts: int
    top_k: int
    splits: Mapping[str, Spread]


@dataclass(frozen=True)
class Picture:
    """An image and the expert that each of its patches chose first.

    Attributes:
        image: a PNG in base64.
        chosen: of each layer the experts, from 0, row by row, ``[layers, rows columns]``.
    """

    domain: str
    truth: str
    image: str
    chosen: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Selection:
    """All of it.

    Attributes:
        network: whose layers these are.
        grid: rows and columns of patches; None: not known, and there are no pictures.
    """

    network: str
    layers: Sequence[Layer]
    grid: tuple[int, int] | None
    pictures: Sequence[Picture]


def agreement(shares: Shares, others: Shares | None = None) -> float | None:
    """The mean over pairs of domains of 1 minus the total variation between their shares ``[domains, E]``; None: there is no pair.

    1 where the same experts work for all domains alike, 0 where no expert works for two of them.

    Args:
        others: pairs are of one domain each from ``shares`` and from here.
    """
    pairs = combinations(shares, 2) if others is None else product(shares, others)
    found = [1 - np.abs(np.subtract(one, other)).sum() / 2 for one, other in pairs]
    return float(np.mean(found)) if found else None


def information(counts: NDArray[Any]) -> float | None:
    """Mutual information of row and column, divided by the mean of their entropies, of counts ``[rows, E]``; None: there are no
    two rows. 0 where the one says nothing of the other, 1 where each tells the other.

    Source: the measure that scikit-learn calls ``normalized_mutual_info_score``.
    """
    if (counts.sum(axis=1) > 0).sum() < 2:
        return None
    joint = counts / counts.sum()
    rows, columns = (_entropy(joint.sum(axis=axis)) for axis in (1, 0))
    return float(max(0.0, 2 * (rows + columns - _entropy(joint)) / (rows + columns)))


def selection_from(facts: Mapping[str, Any]) -> Selection:
    """What :func:`dmoe.report.selection_evidence.gather_selection` made.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it did not.
    """
    layers = [_layer(one) for one in _some(facts["layers"], MOST_LAYERS, "layers")]
    grid = None
    if facts["grid"] is not None:
        rows, columns = (whole(edge, low=1, high=MOST_PATCHES) for edge in facts["grid"])
        grid = rows, columns
    pictures = []
    for one in _some(facts["pictures"], MOST_PICTURES, "pictures") if facts["pictures"] else []:
        if grid is None or grid[0] * grid[1] > MOST_PATCHES:
            raise ValueError(f"pictures with a grid of {grid}")
        chosen = [[whole(e, low=0, high=MOST_EXPERTS - 1) for e in of] for of in _some(one["chosen"], MOST_LAYERS, "layers")]
        if len(chosen) != len(layers) or any(len(of) != grid[0] * grid[1] for of in chosen):
            raise ValueError(f"choices of a picture are not [{len(layers)}, {grid[0] * grid[1]}]")
        if any(max(of) >= layer.experts for of, layer in zip(chosen, layers, strict=True)):
            raise ValueError("a chosen expert that there is not")
        pictures.append(Picture(name_of(one["domain"]), name_of(one["truth"]), small_png(one["image"]), chosen))
    return Selection(name_of(facts["network"]), layers, grid, pictures)


def _entropy(shares: NDArray[Any]) -> float:
    """In nats."""
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def _layer(facts: Mapping[str, Any]) -> Layer:
    experts = whole(facts["experts"], low=1, high=MOST_EXPERTS)
    if not 0 < len(facts["splits"]) <= MOST_SPLITS:
        raise ValueError(f"{len(facts['splits'])} splits, expected 1 to {MOST_SPLITS}")
    splits = {name_of(name): _spread(one, experts) for name, one in facts["splits"].items()}
    return Layer(name_of(facts["name"]), experts, whole(facts["top_k"], low=1, high=experts), splits)


def _spread(facts: Mapping[str, Any], experts: int) -> Spread:
    domains = [name_of(one) for one in _some(facts["domains"], MOST_DOMAINS, "domains")]
    rows = [[_part(value) for value in row] for row in [facts["load"], *facts["shares"]]]
    if len(rows) != len(domains) + 1 or any(len(row) != experts for row in rows):
        raise ValueError(f"shares are not [{len(domains)}, {experts}]")
    numbers = {name: facts[name] for name in ("agreement", "by_domain", "by_class", "with_source")}
    known = {name: None if value is None else _part(value) for name, value in numbers.items()}
    return Spread(rows[0], domains, rows[1:], **known)


def _part(value: Any) -> float:
    number = sure(value)
    if not -1e-6 <= number <= 1 + 1e-6:
        raise ValueError(f"a share of {number}")
    return number


def _some(things: Sequence[Any], most: int, name: str) -> Sequence[Any]:
    if not isinstance(things, list) or not 0 < len(things) <= most:
        raise ValueError(f"expected 1 to {most} {name}")
    return things
