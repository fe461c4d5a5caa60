"""Clusters of equal size, and the best assignment to them."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dmoe.models.sparse.clustering import balanced_clusters, best_assignment


@pytest.mark.parametrize(("points", "clusters"), [(24, 3), (60, 6), (120, 24), (96, 2), (7, 7), (5, 1)])
def test_an_assignment_is_as_good_as_that_of_the_hungarian_method(points: int, clusters: int) -> None:
    for seed in range(5):
        scores = np.random.default_rng(seed).normal(size=(points, clusters))
        labels = best_assignment(scores)
        rows, places = linear_sum_assignment(np.repeat(scores, points // clusters, axis=1), maximize=True)
        expected = scores[rows, places // (points // clusters)].sum()
        assert np.bincount(labels, minlength=clusters).tolist() == [points // clusters] * clusters
        assert scores[np.arange(points), labels].sum() == pytest.approx(expected, abs=1e-9)
        begun = best_assignment(scores, np.arange(points) % clusters)
        assert scores[np.arange(points), begun].sum() == pytest.approx(expected, abs=1e-9)


def test_groups_that_lie_apart_are_found() -> None:
    random = np.random.default_rng(1)
    truth = random.permutation(np.repeat(np.arange(4), 8))
    points = 10 * np.eye(4)[truth] + random.normal(size=(32, 4))
    labels = balanced_clusters(points, clusters=4, seed=0)
    assert len({(t, label) for t, label in zip(truth.tolist(), labels.tolist(), strict=True)}) == 4


def test_clusters_are_equally_large_the_same_for_a_seed_and_no_step_makes_them_better() -> None:
    points = np.random.default_rng(2).normal(size=(90, 5))
    points[:40] = points[0]  # far more alike than fit into one cluster
    labels = balanced_clusters(points, clusters=6, seed=3, iterations=100)
    assert np.bincount(labels).tolist() == [15] * 6
    assert np.array_equal(labels, balanced_clusters(points, clusters=6, seed=3, iterations=100))
    means = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(6)])
    squares = np.square(points[:, None] - means).sum(axis=2)
    rows, places = linear_sum_assignment(np.repeat(squares, 15, axis=1))
    assert squares[np.arange(90), labels].sum() == pytest.approx(squares[rows, places // 15].sum())


def test_equal_points_are_shared_out() -> None:
    assert np.bincount(balanced_clusters(np.ones((12, 3)), clusters=3, seed=0)).tolist() == [4, 4, 4]


def test_a_number_that_clusters_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="7 clusters do not divide 12"):
        balanced_clusters(np.ones((12, 3)), clusters=7, seed=0)
