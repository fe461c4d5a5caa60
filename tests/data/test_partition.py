"""Which expert learns from which domain."""

import json
import random
from collections import Counter
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest

from dmoe.data.partition import partition, write_partition
from dmoe.errors import UserError

SIZES = [(24, 6), (24, 7), (11, 4), (13, 3), (5, 5), (243, 10), (323, 10), (33, 3), (49, 7), (58, 29), (110, 11)]


@pytest.mark.parametrize("seed", [1, 42, 3407])
@pytest.mark.parametrize(("domains", "count"), SIZES)
def test_shuffled_groups_follow_the_floor_rule(domains: int, count: int, seed: int) -> None:
    shuffled = list(range(domains))
    random.Random(seed).shuffle(shuffled)
    expected = {domain: floor(position / Fraction(domains, count)) for position, domain in enumerate(shuffled)}
    assert partition(range(domains), count=count, seed=seed, how="shuffled") == expected


@pytest.mark.parametrize("how", ["shuffled", "interleaved"])
@pytest.mark.parametrize(("domains", "count"), SIZES)
def test_every_expert_has_a_group_of_near_equal_size(domains: int, count: int, how: str) -> None:
    sizes = Counter(partition(range(domains), count=count, seed=1, how=how).values())  # type: ignore[arg-type]
    assert sorted(sizes) == list(range(count))
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_interleaved_groups_hold_neighbours_apart() -> None:
    assert partition([10, 20, 30, 40, 50], count=2, seed=1, how="interleaved") == {10: 0, 20: 1, 30: 0, 40: 1, 50: 0}


@pytest.mark.parametrize("how", ["shuffled", "interleaved"])
def test_order_in_which_domains_are_given_does_not_matter(how: str) -> None:
    forwards, backwards = (partition(order, count=3, seed=1, how=how) for order in ([2, 5, 7, 9], [9, 7, 5, 2]))  # type: ignore[arg-type]
    assert forwards == backwards


def test_seed_changes_the_shuffled_groups_only() -> None:
    shuffled, interleaved = (
        [partition(range(24), count=6, seed=seed, how=how) for seed in (1, 2)] for how in ("shuffled", "interleaved")
    )
    assert shuffled[0] != shuffled[1]
    assert interleaved[0] == interleaved[1]


def test_global_random_state_has_no_part_in_it() -> None:
    random.seed(5)
    one = partition(range(24), count=6, seed=1, how="shuffled")
    random.seed(6)
    assert partition(range(24), count=6, seed=1, how="shuffled") == one


@pytest.mark.parametrize("how", ["shuffled", "interleaved"])
def test_fewer_domains_than_experts_is_told_with_both_numbers(how: str) -> None:
    with pytest.raises(UserError) as caught:
        partition(range(24), count=30, seed=1, how=how)  # type: ignore[arg-type]
    assert str(caught.value).startswith("experts.count: 30 experts need as many source domains, the data set has 24")
    assert "\n" not in str(caught.value)


def test_written_partition_names_the_domains_of_each_expert(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    write_partition(path, {3: 1, 1: 0, 2: 10, 5: 1}, {1: "Oslo", 2: "Rome", 3: "Bern"})
    written = json.loads(path.read_text())
    assert written == {"expert 0": ["1 (Oslo)"], "expert 1": ["3 (Bern)", "5"], "expert 10": ["2 (Rome)"]}
    assert list(written) == ["expert 0", "expert 1", "expert 10"]
