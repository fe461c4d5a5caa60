"""Which expert learns from which domain."""

import json
import random
from collections import Counter
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest

from dmoe.data.partition import check_partition, partition, read_partition, write_partition
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


GROUPS = {3: 1, 1: 0, 2: 2, 5: 1}


def test_written_partition_lists_the_domains_of_each_expert_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    write_partition(path, GROUPS, {1: "Oslo", 2: "Rome", 3: "Bern"})
    assert json.loads(path.read_text()) == {"experts": [[1], [3, 5], [2]], "names": {"1": "Oslo", "2": "Rome", "3": "Bern"}}


def test_written_partition_is_read_back(tmp_path: Path) -> None:
    write_partition(tmp_path / "partition.json", GROUPS, {})
    assert read_partition(tmp_path / "partition.json") == GROUPS


@pytest.mark.parametrize("content", ["{}", '{"experts": [1, 2]}', '{"experts": [["a"]]}', '{"experts": [[true]]}', "[]", "{"])
def test_damaged_partition_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "partition.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_partition(path)
    assert str(caught.value).startswith(f"{path}: damaged") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("domains", "count", "told"),
    [
        ([1, 2, 3, 5], 4, "it shares out domains to 3 experts, experts.count is 4"),
        ([1, 2, 3, 4, 5], 3, "made for other data: it gives domain 4 to no expert"),
        ([1, 2, 3], 3, "made for other data: it shares out domain 5"),
    ],
)
def test_partition_that_does_not_fit_is_told(domains: list[int], count: int, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_partition(GROUPS, domains, count=count, where=Path("p.json"))
    assert str(caught.value).startswith(f"p.json: {told}")


def test_partition_that_fits_passes() -> None:
    check_partition(GROUPS, [5, 3, 2, 1], count=3, where=Path("p.json"))
