"""Episodes: one domain, a support set, a disjoint query set, as a pure function of the step."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.data.episodes import EpisodeSampler
from dmoe.errors import UserError

NAMES = {7: "large", 3: "middle", 5: "small"}


class Uneven(DomainSplit):
    """Domains of given sizes, their images mixed."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        domains = torch.cat([torch.full((size,), number) for number, size in sizes])
        self.domains = domains[torch.randperm(len(domains), generator=torch.Generator().manual_seed(0))]
        self.group_domains, self.labels, self.domain_names = self.domains, self.domains % 2, NAMES

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return index.float().view(-1, 1, 1, 1)


def sampler(*sizes: tuple[int, int], support: int = 8, query: int = 8, seed: int = 1) -> EpisodeSampler:
    return EpisodeSampler(Uneven(sizes), support_size=support, query_size=query, key=(seed, "episode"))


def test_support_and_query_are_disjoint_and_without_repeats() -> None:
    made = sampler((7, 100), (3, 40))
    for step in range(50):
        episode = made(step)
        assert len({*episode.support.tolist(), *episode.query.tolist()}) == 16


def test_all_images_of_an_episode_are_of_its_domain() -> None:
    split = Uneven([(7, 100), (3, 40)])
    made = EpisodeSampler(split, support_size=8, query_size=8, key=(1,))
    for step in range(50):
        episode = made(step)
        assert set(split.domains[torch.cat([episode.support, episode.query])].tolist()) == {episode.domain}


def test_sizes_are_as_asked_where_the_domain_is_large_enough() -> None:
    episode = sampler((7, 100), support=24, query=16)(0)
    assert (len(episode.support), len(episode.query)) == (24, 16)


def test_small_domain_gives_a_whole_support_and_a_smaller_query_set() -> None:
    episode = sampler((5, 11))(0)
    assert (len(episode.support), len(episode.query)) == (8, 3)


def test_domain_without_a_query_image_left_is_never_drawn() -> None:
    made = sampler((7, 100), (5, 8), (3, 9))
    assert {made(step).domain for step in range(200)} == {7, 3}
    assert made.skipped == [5]


def test_domains_are_drawn_uniformly_whatever_their_size() -> None:
    made = sampler((7, 2000), (3, 40), (5, 17), (9, 200))
    drawn = Counter(made(step).domain for step in range(4000))
    # 1000 of each are expected with a standard deviation of 27.
    assert all(abs(drawn[domain] - 1000) < 120 for domain in (7, 3, 5, 9))


def test_every_image_of_a_domain_is_drawn_into_support_and_query() -> None:
    made = sampler((7, 30))
    episodes = [made(step) for step in range(100)]
    for part in ("support", "query"):
        assert len({number for episode in episodes for number in getattr(episode, part).tolist()}) == 30


def test_episode_is_a_function_of_step_and_slot_in_any_order() -> None:
    forwards, backwards = sampler((7, 100), (3, 40)), sampler((7, 100), (3, 40))
    keys = [(step, slot) for step in range(5) for slot in range(2)]
    one = {key: forwards(*key) for key in keys}
    other = {key: backwards(*key) for key in reversed(keys)}
    assert all(torch.equal(one[key].support, other[key].support) and one[key].draw == other[key].draw for key in keys)


def test_steps_slots_and_seeds_give_different_episodes() -> None:
    draws = [made(step, slot).draw for made in (sampler((7, 100)), sampler((7, 100), seed=2)) for step in (0, 1) for slot in (0, 1)]
    assert len(set(draws)) == len(draws)


def test_global_random_state_has_no_part_in_it() -> None:
    torch.manual_seed(1)
    one = sampler((7, 100))(3).support
    torch.manual_seed(2)
    assert torch.equal(sampler((7, 100))(3).support, one)


def test_support_larger_than_every_domain_is_told_with_the_largest_that_fits() -> None:
    with pytest.raises(UserError) as caught:
        sampler((7, 20), (3, 10), support=20)
    message = str(caught.value)
    assert message.startswith("meta.support_size: 20 images and one to query are more than any source domain has")
    assert "choose at most 19" in message
    assert "\n" not in message


def test_largest_support_that_the_message_offers_works() -> None:
    assert len(sampler((7, 20), (3, 10), support=19)(0).query) == 1
