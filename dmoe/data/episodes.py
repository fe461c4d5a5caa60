"""The sampler of episodes: one source domain, a support set and a disjoint query set of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.randomness import Key, generator, seed_of


@dataclass(frozen=True)
class Episode:
    """Images by number.

    Attributes:
        domain: all images are of this one.
        support: ``[S]``, their labels are not to be used.
        query: ``[Q]``, disjoint from the support; smaller than asked for where the domain is small.
        draw: seed of the fresh augmentation of the query images, and of the support's views.
    """

    domain: int
    support: Tensor
    query: Tensor
    draw: int


class EpisodeSampler:
    """Episodes as a pure function of the step: a domain uniformly at random, images of it without replacement.

    A domain with no query image left once its support set is taken is never drawn.

    Attributes:
        skipped: domains that are too small.
    """

    def __init__(self, split: DomainSplit, *, support_size: int, query_size: int, key: tuple[Key, ...]) -> None:
        """
        Raises:
            UserError: no domain is large enough.
        """
        self._members = {domain: m for domain, m in split.members.items() if len(m) > support_size}
        self._domains = list(self._members)
        self.skipped = [domain for domain in split.members if domain not in self._members]
        if not self._domains:
            largest = max(len(m) for m in split.members.values())
            raise UserError(
                f"meta.support_size: {support_size} images and one to query are more than any source domain has "
                f"(the largest: {largest}): choose at most {largest - 1}"
            )
        self._support_size, self._size, self._key = support_size, support_size + query_size, key

    def __call__(self, step: int, slot: int = 0) -> Episode:
        """The episode of a step; ``slot`` counts the episodes of one update."""
        random = generator(*self._key, step, slot)
        domain = self._domains[int(torch.randint(len(self._domains), (), generator=random))]
        members = self._members[domain]
        chosen = members[torch.randperm(len(members), generator=random)[: self._size]]
        return Episode(
            domain=domain,
            support=chosen[: self._support_size],
            query=chosen[self._support_size :],
            draw=seed_of(*self._key, step, slot, "draw"),
        )
