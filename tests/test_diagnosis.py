"""What adapting did, and whether training episodes do the same: against numpy and scipy."""

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from dmoe.diagnosis import Diagnosis, Episodes, Range, Ranges, Summary, learned_ranges, measured, summaries

SPREAD, SIZE = "spread of predictions", "movement of features"


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


# Statistics


@pytest.mark.parametrize("classes", [True, False])
def test_statistics_are_what_numpy_makes_of_each_batch(classes: bool) -> None:
    before, after, targets = torch.randn(3, 3, 5, 4, dtype=torch.float64)
    outputs = torch.randn(3, 5, 3, dtype=torch.float64)
    outputs = outputs.softmax(dim=2) if classes else outputs
    found = measured(before, after, targets, outputs, classes=classes)
    assert len(found) == 3
    for statistics, *batch in zip(found, before.numpy(), after.numpy(), targets.numpy(), outputs.numpy(), strict=True):
        b, a, t, p = batch
        expected = {
            "variation of features": np.sqrt(np.var(b, axis=0, ddof=1).mean()),
            "variation of targets": np.sqrt(np.var(t, axis=0, ddof=1).mean()),
            "distance to targets": rms(b - t),
            "movement of features": rms(a - b),
        }
        if classes:
            expected["spread of predictions"] = scipy.stats.entropy(p.mean(axis=0))
            expected["entropy of predictions"] = np.mean([scipy.stats.entropy(row) for row in p])
        else:
            expected["spread of values"] = np.sqrt(np.var(p, axis=0, ddof=1).mean())
        assert statistics == pytest.approx(expected, rel=1e-12)


def test_one_image_does_not_vary_and_has_the_spread_of_its_own_prediction() -> None:
    features, outputs = torch.randn(1, 1, 4), torch.tensor([[[0.25, 0.75]]])
    (found,) = measured(features, features, features, outputs, classes=True)
    assert found["variation of features"] == found["variation of targets"] == found["movement of features"] == 0
    assert found["spread of predictions"] == found["entropy of predictions"] == pytest.approx(scipy.stats.entropy([0.25, 0.75]))


def test_probabilities_of_zero_add_nothing_to_the_entropy() -> None:
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    (found,) = measured(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), outputs, classes=True)
    assert found["entropy of predictions"] == 0
    assert found["spread of predictions"] == pytest.approx(math.log(2))


# Ranges


def test_a_summary_parts_the_variance_between_domains_from_that_within() -> None:
    values = [[1.0, 2.0, 6.0], [0.5, 0.25], [3.0, 3.5, 2.0, 8.0]]
    found = Summary.of(values)
    assert found is not None
    means = [np.mean(v) for v in values]
    pooled = sum(np.var(v) * len(v) for v in values) / (9 - 3)
    assert found.center == pytest.approx(np.mean(means))
    assert found.between == pytest.approx(np.var(means, ddof=1))
    assert found.within == pytest.approx(pooled * (1 - np.mean([1 / 3, 1 / 2, 1 / 4])))
    assert (found.domains, found.batches, found.low, found.high) == (3, 9, 0.25, 8.0)


def test_the_interval_is_that_of_a_random_effects_model() -> None:
    values = np.random.default_rng(0).normal(size=(6, 1)) + np.random.default_rng(1).normal(size=(6, 5))
    found = Summary.of(values.tolist())
    assert found is not None
    between, within = values.mean(axis=1).var(ddof=1), values.var(axis=1, ddof=1).mean() * 4 / 5
    freedom = (between + within) ** 2 / (between**2 / 5 + within**2 / 24)
    half = scipy.stats.t.ppf(1 - 0.001 / 2, freedom) * np.sqrt(between + within + between / 6)
    assert found.interval(0.001) == pytest.approx((values.mean() - half, values.mean() + half))
    assert found.interval(0.9) == (values.min(), values.max()), "no narrower than what was seen"


def test_a_batch_of_a_further_domain_is_outside_about_as_rarely_as_asked_for() -> None:
    random, outside = np.random.default_rng(0), 0
    for _ in range(1000):
        domains = random.normal(scale=0.7, size=(9, 1))
        values = domains + random.normal(size=(9, 6))
        summary = Summary.of(values[:8].tolist())
        assert summary is not None
        low, high = summary.interval(0.02)
        outside += not low <= values[8, 0] <= high
    assert 8 <= outside <= 32, "of 1000, 20 are asked for"


def test_one_domain_tells_nothing_of_another() -> None:
    assert Summary.of([[1.0, 2.0, 3.0]]) is None
    assert Summary.of([[1.0, 2.0], [], [math.nan, math.inf]]) is None
    assert learned_ranges([summaries({4: [{SIZE: 1.0}, {SIZE: 2.0}]})], images=8).by_name == {}


def episodes(name: str, *domains: list[float]) -> Episodes:
    return {number: [{name: value} for value in values] for number, values in enumerate(domains)}


def test_sizes_are_judged_by_their_logarithms_and_entropies_as_they_are() -> None:
    values = [[1.0, 2.0], [3.0, 1.5], [2.5, 2.0]]
    for name, there, back in ((SIZE, math.log, math.exp), (SPREAD, float, float)):
        summary = Summary.of([[there(value) for value in domain] for domain in values])
        assert summary is not None
        ranges = learned_ranges([summaries(episodes(name, *values))], images=8, false_alarms=0.05)
        low, high = summary.interval(0.05)
        assert ranges.by_name[name].low == pytest.approx(max(0, back(low)))
        assert ranges.by_name[name].high == pytest.approx(back(high))


def test_ranges_take_in_every_split_and_share_out_the_false_alarms() -> None:
    near = {0: [{SPREAD: 2.0, SIZE: 1.0}, {SPREAD: 2.1, SIZE: 1.1}], 1: [{SPREAD: 1.9, SIZE: 1.2}, {SPREAD: 2.2, SIZE: 0.9}]}
    far = {7: [{SPREAD: 1.2, SIZE: 5.0}, {SPREAD: 1.3, SIZE: 5.1}], 8: [{SPREAD: 1.1, SIZE: 5.2}, {SPREAD: 1.2, SIZE: 5.3}]}
    both = learned_ranges([summaries(near), summaries(far)], images=8, false_alarms=0.2)
    alone = [learned_ranges([summaries(split)], images=8, false_alarms=0.2) for split in (near, far)]
    for name in (SPREAD, SIZE):
        assert both.by_name[name].low == min(one.by_name[name].low for one in alone)
        assert both.by_name[name].high == max(one.by_name[name].high for one in alone)
    low, high = summaries(near)[SPREAD].interval(0.2 / 2)
    assert alone[0].by_name[SPREAD] == Range(low, high)


def test_what_never_varies_is_not_judged_and_what_is_zero_at_times_may_be() -> None:
    still = learned_ranges([summaries(episodes(SIZE, [2.0, 2.0], [2.0], [2.0]))], images=8)
    absent = learned_ranges([summaries(episodes(SIZE, [0.0, 0.0], [0.0], [0.0]))], images=8)
    assert still.by_name == absent.by_name == {}
    at_times = learned_ranges([summaries(episodes(SIZE, [1.0, 0.0], [1.5], [2.0]))], images=8).by_name[SIZE]
    assert 0.0 in at_times and 1.2 in at_times and at_times.low == 0


def test_ranges_and_summaries_come_back_from_json() -> None:
    summary = Summary.of([[1.0, -math.inf], [2.0, 3.0], [4.0]])
    assert summary is not None and summary.low == -math.inf
    assert Summary.from_facts(json.loads(json.dumps(summary.to_facts(), allow_nan=False))) == summary
    ranges = Ranges({SPREAD: Range(0.1, 1 / 3), SIZE: Range(0.0, 1e-7)}, images=8)
    assert Ranges.from_facts(json.loads(json.dumps(ranges.to_facts(), allow_nan=False))) == ranges


@pytest.mark.parametrize("facts", [{}, {"images": 8}, {"images": 8, "ranges": 3}, {"images": 8, "ranges": {"a": {"low": 1}}}])
def test_facts_of_something_else_are_no_ranges(facts: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Ranges.from_facts(facts)


# Verdicts

RANGES = Ranges({SPREAD: Range(1.9, 2.3), SIZE: Range(0.5, 1.5)}, images=64)


def test_within_the_ranges_nothing_is_suspect() -> None:
    found = RANGES.judged({SPREAD: 1.9, SIZE: 1.5, "unheard of": 1e9}, images=64)
    assert (found.outside, found.suspect) == ((), False)
    assert str(found) == "as in training episodes: 2 statistics within their ranges"


@pytest.mark.parametrize("value", [1.8999, 2.3001, math.nan, math.inf])
def test_what_is_outside_or_no_number_is_suspect(value: float) -> None:
    found = RANGES.judged({SPREAD: value, SIZE: 1.0}, images=64)
    assert (found.outside, found.suspect) == ((SPREAD,), True)


def test_a_suspect_says_in_one_line_why() -> None:
    assert str(RANGES.judged({SPREAD: 0.0312, SIZE: 1.0}, images=64)) == (
        "suspect: spread of predictions 0.0312, training episodes 1.9 to 2.3"
    )
    assert str(RANGES.judged({SPREAD: 0.0, SIZE: 9.0}, images=1)) == (
        "suspect: spread of predictions 0, training episodes 1.9 to 2.3; also movement of features; images: 1, training episodes 64"
    )


def test_without_ranges_nothing_is_suspect() -> None:
    for found in (Diagnosis(), Diagnosis({SPREAD: math.nan}, images=1), Ranges({}, images=8).judged({SPREAD: 1.0}, images=8)):
        assert not found.suspect
        assert str(found) == "no ranges: not compared with training episodes"
