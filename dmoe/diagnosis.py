"""What adapting did to a support batch, told by numbers that need no labels, and how far such numbers go in training episodes.

A range is learned, not guessed. Batches of the run's support size are drawn from source domains, as training episodes are, and from
validation domains, which no network has learned from and which therefore tell how far an honest unseen domain lies. Kept of each
statistic are the mean over domains, the variance between domains and the one within; the range is where one batch of a further
domain falls but for rare false alarms (a prediction interval of a one-way random-effects model, with Satterthwaite's degrees of
freedom), widened to all that was seen. Quantiles would need no such model, but those of a few domains cannot reach beyond them, and
every new domain would be suspect once in that many.

Notation: G support batches, B images in each, feature width D, K outputs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

FALSE_ALARMS = 0.01
"""Of the batches of honest unseen domains, the share that may be suspect, all statistics together."""

ENTROPIES = ("spread of predictions", "entropy of predictions")
"""Judged as they are. All other statistics are sizes, which vary by factors: they are judged by their logarithms."""

Statistics = Mapping[str, float]
Episodes = Mapping[int, Sequence[Statistics]]
"""The statistics of several batches of each domain."""


def measured(before: Tensor, after: Tensor, targets: Tensor, outputs: Tensor, *, classes: bool) -> list[dict[str, float]]:
    """The statistics of adapting to each of G support batches.

    - spread of predictions: the entropy of the mean prediction, in nats: 0 for one class only, ln K for all alike. Of values: their
      standard deviation.
    - entropy of predictions: the mean over images, in nats; only where there are classes.
    - variation of features, of targets: their standard deviation over the batch; that of one image is 0. Features before adapting.
    - distance to targets: of the features, before adapting.
    - movement of features: by adapting.

    Sizes are root mean squares over all entries. The distance that is left after adapting is not among them: on validation domains
    of the embedded digits its long tail made half of the false alarms, and it found nothing that the others do not find.

    Args:
        before: the features of the support images before adapting, ``[G, B, D]``.
        after: those after it, ``[G, B, D]``.
        targets: what they were to become, ``[G, B, D]``.
        outputs: of the adapted student, probabilities or values ``[G, B, K]``.
        classes: whether outputs are probabilities.
    """
    if classes:
        found = dict(zip(ENTROPIES, (_entropy(outputs.mean(dim=1)), _entropy(outputs).mean(dim=1)), strict=True))
    else:
        found = {"spread of values": _variation(outputs)}
    found |= {
        "variation of features": _variation(before),
        "variation of targets": _variation(targets),
        "distance to targets": _size(before - targets),
        "movement of features": _size(after - before),
    }
    rows: list[list[float]] = torch.stack(list(found.values()), dim=1).tolist()  # one wait for the device
    return [dict(zip(found, row, strict=True)) for row in rows]


def _size(x: Tensor) -> Tensor:
    """``[G, B, D] -> [G]``."""
    return x.square().mean(dim=(1, 2)).sqrt()


def _variation(x: Tensor) -> Tensor:
    """``[G, B, D] -> [G]``."""
    if x.shape[1] == 1:
        return x.new_zeros(len(x))
    return x.var(dim=1).mean(dim=1).sqrt()


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, both included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high  # not a number: nowhere


@dataclass(frozen=True)
class Diagnosis:
    """What adapting did to the support images, beside what it does in training episodes.

    Attributes:
        statistics: by name, see :func:`measured`; empty where nothing was measured.
        ranges: of training episodes, by the same names; empty where they are not known, and then nothing is suspect.
        images: how many were adapted to.
        usual_images: how many training episodes have.
    """

    statistics: Statistics = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    images: int = 0
    usual_images: int = 0

    @property
    def outside(self) -> tuple[str, ...]:
        """The statistics that lie outside of their ranges."""
        return tuple(name for name, value in self.statistics.items() if name in self.ranges and value not in self.ranges[name])

    @property
    def suspect(self) -> bool:
        return bool(self.outside)

    def __str__(self) -> str:
        if not self.ranges:
            return "no ranges: not compared with training episodes"
        if not self.suspect:
            return f"as in training episodes: {len(self.ranges)} statistics within their ranges"
        first, *others = self.outside
        low, high = (f"{bound:.3g}" for bound in (self.ranges[first].low, self.ranges[first].high))
        text = f"suspect: {first} {self.statistics[first]:.3g}, training episodes {low} to {high}"
        if others:
            text += f"; also {', '.join(others)}"
        if self.images != self.usual_images:
            text += f"; images: {self.images}, training episodes {self.usual_images}"
        return text


@dataclass(frozen=True)
class Ranges:
    """How far the statistics of training episodes go.

    Attributes:
        by_name: only of statistics that vary.
        images: in a support batch.
    """

    by_name: Mapping[str, Range]
    images: int

    def judged(self, statistics: Statistics, *, images: int) -> Diagnosis:
        """Statistics of adapting to so many images, beside these ranges."""
        return Diagnosis(statistics, self.by_name, images, self.images)

    def to_facts(self) -> dict[str, Any]:
        return {"images": self.images, "ranges": {name: asdict(one) for name, one in self.by_name.items()}}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Ranges":
        """Raises KeyError, TypeError or ValueError where ``facts`` are not those of ranges."""
        bounds = {name: Range(float(one["low"]), float(one["high"])) for name, one in dict(facts["ranges"]).items()}
        return cls(bounds, int(facts["images"]))


@dataclass(frozen=True)
class Summary:
    """One statistic, or its logarithm, over batches of several domains; those where it is not a finite number are left out.

    Attributes:
        center: the mean of the domains' means.
        between: the variance of the domains' means.
        within: the variance of a batch inside its domain that is not in ``between`` already.
        low, high: the least and the greatest, infinite ones included.
    """

    center: float
    between: float
    within: float
    domains: int
    batches: int
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[Sequence[float]]) -> "Summary | None":
        """Of the values of each domain; None where fewer than two domains have any, which tells nothing of a third."""
        every = [[value for value in domain if not math.isnan(value)] for domain in values]
        finite = [torch.tensor(kept, dtype=torch.float64) for domain in every if (kept := [v for v in domain if math.isfinite(v)])]
        domains, batches = len(finite), sum(map(len, finite))
        if domains < 2:
            return None
        means = torch.stack([domain.mean() for domain in finite])
        within = 0.0
        if batches > domains:
            squares = sum(float((domain - domain.mean()).square().sum()) for domain in finite)
            within = squares / (batches - domains) * (1 - sum(1 / len(domain) for domain in finite) / domains)
        seen = [value for domain in every for value in domain]
        return cls(float(means.mean()), float(means.var()), within, domains, batches, min(seen), max(seen))

    def to_facts(self) -> dict[str, Any]:
        """JSON knows no infinite numbers."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Summary":
        infinite = {key: sign * math.inf for key, sign in (("low", -1), ("high", 1)) if facts[key] is None}
        return cls(**{**facts, **infinite})

    def interval(self, false_alarms: float) -> tuple[float, float]:
        """Where a batch of another domain falls, but for a share ``false_alarms``; no narrower than what was seen."""
        from scipy.special import stdtrit

        variance = self.between + self.within
        if variance == 0:
            return self.low, self.high
        doubt = self.between**2 / (self.domains - 1)
        if self.within > 0:
            doubt += self.within**2 / (self.batches - self.domains)
        t = float(stdtrit(variance**2 / doubt, 1 - false_alarms / 2))
        half = t * math.sqrt(variance + self.between / self.domains)
        return min(self.center - half, self.low), max(self.center + half, self.high)


def summaries(episodes: Episodes) -> dict[str, Summary]:
    """Of each statistic, on the scale that it is judged on."""
    names = dict.fromkeys(name for batches in episodes.values() for batch in batches for name in batch)
    found = {}
    for name in names:
        summary = Summary.of([[_scaled(name, batch[name]) for batch in batches] for batches in episodes.values()])
        if summary is not None:
            found[name] = summary
    return found


def learned_ranges(splits: Iterable[Mapping[str, Summary]], *, images: int, false_alarms: float = FALSE_ALARMS) -> Ranges:
    """The ranges that take in the batches of every split, each split having its own centre.

    Args:
        splits: the :func:`summaries` of each.
        images: in each batch.
        false_alarms: shared out evenly among the statistics.
    """
    splits = list(splits)
    names = dict.fromkeys(name for split in splits for name in split)
    by_name = {}
    for name in names:
        intervals = [split[name].interval(false_alarms / len(names)) for split in splits if name in split]
        low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
        if low < high:
            by_name[name] = Range(_unscaled(name, low), _unscaled(name, high))
    return Ranges(by_name, images)


def _scaled(name: str, value: float) -> float:
    if name in ENTROPIES:
        return value
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan


def _unscaled(name: str, value: float) -> float:
    """Back again; no statistic is below 0."""
    return max(0.0, value) if name in ENTROPIES else math.exp(value) if value < math.log(1e300) else math.inf
