"""Intervals: against closed forms, and how often they hold what they are to hold."""

import numpy as np
import pytest
from scipy import stats

from dmoe.report.statistics import bootstrap_means, half_width, paired_difference, spread, tail_of


def test_a_spread_is_mean_and_sample_deviation() -> None:
    found = spread([0.2, 0.3, 0.7])
    assert found is not None
    assert found.deviation is not None
    assert (found.mean, found.deviation, found.count) == pytest.approx((0.4, np.std([0.2, 0.3, 0.7], ddof=1), 3))
    assert spread([]) is None
    one = spread([0.5])
    assert one is not None
    assert one.deviation is None


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.81, 0.84, 0.79, 0.86]
    low, high = stats.t.interval(0.95, df=3, loc=np.mean(values), scale=stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)
    assert half_width([0.8]) is None


def test_the_bootstrap_varies_as_seeds_and_domains_do() -> None:
    """Differences of seeds plus differences of domains: the variance of the mean over what is drawn is the sum of two known ones."""
    seeds, domains = np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0, 3.0, 7.0, 9.0])
    means = bootstrap_means(seeds[:, None] + domains[None], draws=200_000)
    assert means.mean() == pytest.approx(seeds.mean() + domains.mean(), abs=0.02)
    assert means.var() == pytest.approx(seeds.var() / 3 + domains.var() / 5, rel=0.02)


def test_the_bootstrap_of_one_seed_draws_domains_only() -> None:
    domains = np.array([[0.0, 1.0]])
    found, counts = np.unique(bootstrap_means(domains, draws=40_000), return_counts=True)
    assert found.tolist() == [0.0, 0.5, 1.0]
    assert counts / 40_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_of_one_factor_the_interval_is_the_expanded_percentile_interval() -> None:
    """Hesterberg 2015: the percentile of Student's t times sqrt(n / (n - 1)), by way of the normal distribution."""
    values = np.array([[0.1, 0.2, 0.25, 0.4, 0.45, 0.7, 0.9, 1.3]])
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 7) * np.sqrt(8 / 7))
    assert tail_of(values) == pytest.approx(tail)
    found = paired_difference(values)
    assert found is not None
    expected = np.quantile(bootstrap_means(values), [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_with_many_seeds_and_domains_it_is_the_percentile_interval() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(400, 1)) + random.normal(size=(1, 400))
    assert tail_of(values) == pytest.approx(0.025, rel=0.05)


@pytest.mark.parametrize(("of_seeds", "of_domains", "of_both"), [(1.0, 1.0, 1.0), (1.0, 0.0, 0.5), (0.2, 1.0, 0.5)])
def test_the_interval_holds_the_truth_in_95_of_100_cases(of_seeds: float, of_domains: float, of_both: float) -> None:
    random, held, times = np.random.default_rng(0), 0, 400
    for _ in range(times):
        seeds, domains = random.normal(0, of_seeds, (5, 1)), random.normal(0, of_domains, (1, 16))
        found = paired_difference(0.3 + seeds + domains + random.normal(0, of_both, (5, 16)), draws=2_000)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / times <= 0.985


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=(5, 16))
    assert paired_difference(values) == paired_difference(values)


def test_missing_pairs_are_left_out_and_counted() -> None:
    values = np.array([[0.1, 0.3, np.nan], [np.nan, 0.5, np.nan]])
    found = paired_difference(values)
    assert found is not None
    assert (found.mean, found.pairs) == (pytest.approx(0.3), 3)
    assert found.low is not None
    assert found.high is not None
    assert 0.1 <= found.low <= found.mean <= found.high <= 0.5


def test_where_nothing_varies_or_is_known_there_is_no_interval() -> None:
    same = paired_difference(np.full((3, 4), 0.2))
    assert same is not None
    assert (same.low, same.high, same.is_clear) == (None, None, False)
    assert paired_difference(np.full((2, 2), np.nan)) is None
    assert paired_difference(np.zeros((0, 3))) is None


def test_a_difference_is_clear_where_its_interval_leaves_zero_out() -> None:
    random = np.random.default_rng(3)
    clear, unclear = (paired_difference(mean + random.normal(0, 1, (5, 16))) for mean in (3.0, 0.0))
    assert clear is not None
    assert unclear is not None
    assert clear.is_clear
    assert not unclear.is_clear
