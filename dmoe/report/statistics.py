"""Means with their uncertainty: of a few seeds, and of the difference of two methods over domains and seeds.

Notation: n seeds, m domains; differences ``[n, m]``, not a number where one of the two methods was not tested.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

DRAWS = 20_000
SEED = 2022
LEVEL = 0.95
AT_ONCE = 2_000
"""Draws in memory at a time."""

ROUNDING = 1e-12
"""What varies by less than that part of itself does not vary."""

WHAT_THE_INTERVAL_IS = (
    "Differences are paired: method minus method on the same domain with the same seed, averaged. The 95 % interval is a bootstrap "
    f"over both: {DRAWS:,} times, seeds and domains are each drawn anew with replacement, and the differences are averaged over "
    "what was drawn. Its ends are percentiles of these averages, moved outwards because seeds or domains are few (Student's t with "
    "Satterthwaite's degrees of freedom, expanded as by Hesterberg 2015). It tells how far the difference may be another one with "
    "other seeds and other domains of the same kind; with one seed, with other domains only."
)


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        deviation: of a sample (n - 1); None: one seed.
        count: n.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences; ``low`` and ``high`` are the ends of its interval, None where there is too little to tell.

    Attributes:
        pairs: seeds and domains that both methods were tested on, n times m where none is missing.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)), len(values))


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of a normal sample, by Student's t; None of fewer than two values."""
    found = spread(values)
    if found is None or found.deviation is None:
        return None
    return float(stdtrit(found.count - 1, (1 + LEVEL) / 2)) * found.deviation / math.sqrt(found.count)


def paired_difference(differences: np.ndarray, *, draws: int = DRAWS) -> Difference | None:
    """The mean of differences ``[n, m]`` and its interval by a bootstrap over seeds and domains; None where there are none.

    Seeds and domains are crossed, so each is drawn as a whole. Source: Owen, *The pigeonhole bootstrap*, Annals of Applied
    Statistics 2007; Hesterberg, *What teachers should know about the bootstrap*, The American Statistician 2015, section 4.
    """
    known = ~np.isnan(differences)
    kept = differences[known.any(axis=1)][:, known.any(axis=0)]
    if kept.size == 0:
        return None
    mean, pairs = float(np.nanmean(kept)), int(known.sum())
    tail = tail_of(kept)
    if tail is None:
        return Difference(mean, None, None, pairs)
    low, high = np.quantile(bootstrap_means(kept, draws=draws), [tail, 1 - tail])
    return Difference(mean, float(low), float(high), pairs)


def bootstrap_means(differences: np.ndarray, *, draws: int = DRAWS) -> np.ndarray:
    """Means of differences ``[n, m]`` over seeds and domains drawn with replacement, ``[draws]``; missing pairs are left out."""
    random = np.random.default_rng(SEED)
    n, m = differences.shape
    known = ~np.isnan(differences)
    values = np.where(known, differences, 0.0)
    means = []
    for begin in range(0, draws, AT_ONCE):
        count = min(AT_ONCE, draws - begin)
        seeds = random.multinomial(n, np.full(n, 1 / n), size=count)
        domains = random.multinomial(m, np.full(m, 1 / m), size=count)
        total = ((seeds @ values) * domains).sum(axis=1)
        pairs = ((seeds @ known.astype(float)) * domains).sum(axis=1)
        means.append(total[pairs > 0] / pairs[pairs > 0])
    return np.concatenate(means)


def tail_of(differences: np.ndarray) -> float | None:
    """Which part of the bootstrap is cut off at each end: 2.5 % of many seeds and domains, less of few; None: nothing varies.

    The percentiles of a bootstrap of k values are those of a normal distribution too narrow by sqrt((k - 1) / k); an interval for
    the mean takes them from Student's t. Of two factors, degrees of freedom are by Satterthwaite's formula.
    """
    parts = []  # (share of the variance of the mean, values)
    for axis in (1, 0):
        means = np.nanmean(differences, axis=axis)
        if len(means) > 1:
            parts.append((float(means.var(ddof=1)) / len(means), len(means)))
    variance = sum(share for share, _ in parts)
    if variance <= (ROUNDING * float(np.nanmax(np.abs(differences)))) ** 2:
        return None
    freedom = variance**2 / sum(share**2 / (count - 1) for share, count in parts)
    narrowed = sum(share * (count - 1) / count for share, count in parts)
    return float(ndtr(-stdtrit(freedom, (1 + LEVEL) / 2) * math.sqrt(variance / narrowed)))
