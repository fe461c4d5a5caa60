"""Balanced k-means: clusters of exactly equal size.

Assigning points to places is a transport problem. An assignment is the best one where no ring of clusters can hand on a point
each, from one to the next, and gain by it (Klein, *A primal method for minimal cost flows*, 1967); so rings that gain are looked
for, from the last step's assignment on, until there are none.
"""

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]

GAIN = 1e-12
"""What a ring must gain; less is rounding."""


def balanced_clusters(points: Scores, *, clusters: int, seed: int, iterations: int = 20) -> Labels:
    """Labels ``[n]`` of points ``[n, d]``, ``n / clusters`` of each, which make the squared distances from cluster means small.

    Args:
        seed: of the first means, spread as in k-means++ (Arthur and Vassilvitskii, 2007).
        iterations: of new means at most; it ends where they change no label.

    Raises:
        ValueError: the clusters do not divide n.
    """
    if len(points) % clusters:
        raise ValueError(f"{clusters} clusters do not divide {len(points)} points")
    means = _spread(points, clusters, np.random.default_rng(seed))
    labels: Labels | None = None
    for _ in range(iterations):
        scores = points @ means.T - np.square(means).sum(axis=1) / 2
        found = best_assignment(scores, labels)
        if labels is not None and np.array_equal(found, labels):
            break
        labels = found
        means = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(clusters)])
    assert labels is not None
    return labels


def best_assignment(scores: Scores, start: Labels | None = None) -> Labels:
    """The labels ``[n]``, equally many of each of c clusters, with the largest sum of scores ``[n, c]``.

    Args:
        start: labels to begin with, equally many of each; None: a greedy choice.
    """
    labels = _greedy(scores) if start is None else start.copy()
    clusters = scores.shape[1]
    gains, movers = np.full((clusters, clusters), -np.inf), np.zeros((clusters, clusters), dtype=np.int64)

    def renew(cluster: int) -> None:
        """What handing on one of this cluster's points to each other one gains, and which point that is."""
        members = np.flatnonzero(labels == cluster)
        difference = scores[members] - scores[members, cluster][:, None]
        best = difference.argmax(axis=0)
        gains[cluster], movers[cluster] = difference[best, np.arange(clusters)], members[best]
        gains[cluster, cluster] = -np.inf

    for cluster in range(clusters):
        renew(cluster)
    while ring := _gaining_ring(gains):
        for giver, taker in zip(ring, [*ring[1:], ring[0]], strict=True):
            labels[movers[giver, taker]] = taker
        for cluster in ring:
            renew(cluster)
    return labels


def _gaining_ring(gains: Scores) -> list[int]:
    """Clusters along which handing on gains in sum; empty where there are none. By Bellman and Ford's longest ways."""
    pairs = gains + gains.T
    if pairs.max() > GAIN:
        return [int(place) for place in np.unravel_index(pairs.argmax(), pairs.shape)]
    clusters = len(gains)
    best, before = np.zeros(clusters), np.full(clusters, -1)
    last = -1
    for _ in range(clusters):
        through = best[:, None] + gains
        found = through.max(axis=0)
        better = found > best + GAIN
        if not better.any():
            return []
        before[better] = through.argmax(axis=0)[better]
        best = np.where(better, found, best)
        last = int(np.flatnonzero(better)[0])
        ring = _ring_behind(last, before)
        if ring:
            gain = sum(gains[giver, taker] for giver, taker in zip(ring, [*ring[1:], ring[0]], strict=True))
            return ring if gain > GAIN else []
    return []


def _ring_behind(place: int, before: NDArray[np.int64]) -> list[int]:
    """The ring that going back from ``place`` runs into; empty where it comes to an end."""
    seen: dict[int, int] = {}
    way: list[int] = []
    while place >= 0 and place not in seen:
        seen[place] = len(way)
        way.append(place)
        place = int(before[place])
    return way[seen[place] :][::-1] if place >= 0 else []


def _greedy(scores: Scores) -> Labels:
    """The pair that loses least against its point's best cluster first, as long as there is room."""
    count, clusters = scores.shape
    room, labels = [count // clusters] * clusters, np.full(count, -1)
    loss = scores - scores.max(axis=1, keepdims=True)
    for pair in np.argsort(-loss, axis=None, kind="stable").tolist():
        point, cluster = divmod(pair, clusters)
        if labels[point] < 0 and room[cluster]:
            labels[point] = cluster
            room[cluster] -= 1
    return labels


def _spread(points: Scores, clusters: int, random: np.random.Generator) -> Scores:
    """First means: points drawn in proportion to their squared distance from those before."""
    chosen = [int(random.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    for _ in range(clusters - 1):
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(axis=1))
        total = nearest.sum()
        chosen.append(int(random.choice(len(points), p=nearest / total)) if total > 0 else int(random.integers(len(points))))
    return points[chosen]
