"""How a method meets the images of unseen domains: what it adapts to, from where, and what it then predicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.randomness import generator

Kind = Literal["per domain", "per batch", "continual", "mixed batches", "skewed batches"]
"""per domain: adapt once on the domain's first images, then predict all of it (the paper's). The others cut all images into
batches, each of which is adapted to and predicted: per batch, always from the source model; continual, from where the batch before
left, through one domain after the other, and never reset; mixed batches, of all domains together; skewed batches, of a domain
sorted by class; these two from the source model too."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Predict = Literal["after", "before"]


@dataclass(frozen=True)
class Visit:
    """Image numbers adapted to ``[B]``, and batches of them then predicted."""

    support: Tensor
    predicted: tuple[Tensor, ...]


@dataclass(frozen=True)
class Protocol:
    """A protocol by name and size.

    Attributes:
        support_size: images adapted to at a time; a domain with fewer is adapted to with those it has.
        kind: see :data:`Kind`.
        score_support: whether the images adapted to count in the metrics; in batches they do in any case.
        predict: continual only; before: a batch is predicted by what the batches before it have left; the first, by its own.
        support_from: per domain only; another domain to take the support images from, by domain: a control.
        images: how many of each domain, its first ones, go into batches; None: all. The others are neither predicted nor scored.
    """

    support_size: int
    kind: Kind = "per domain"
    score_support: bool = True
    predict: Predict = "after"
    support_from: Mapping[int, int] | None = None
    images: int | None = None

    def __str__(self) -> str:
        parts = [self.kind, f"support {self.support_size}"]
        parts += ["support from another domain"] if self.support_from else []
        parts += [] if self.score_support else ["support not scored"]
        parts += ["predicted before the update"] if self.predict == "before" else []
        return ", ".join(parts)

    def chains(self, split: DomainSplit, batch_size: int) -> list[list[Visit]]:
        """Visits that go on from one another, in order; each chain starts from the source model.

        Args:
            batch_size: images predicted at a time, where all of a domain are.
        """
        members = self._members(split)
        if self.kind == "per domain":
            supports = {d: split.members[self.support_from[d] if self.support_from else d] for d in members}
            return [[Visit(supports[d][: self.support_size], tuple(m.split(batch_size)))] for d, m in members.items()]
        if self.kind == "mixed batches":
            everything = torch.cat(list(members.values()))
            drawn = everything[torch.randperm(len(everything), generator=generator("mixed batches"))]
            return [[Visit(batch, (batch,))] for batch in drawn.split(self.support_size)]
        if self.kind == "skewed batches":
            members = {d: m[torch.argsort(split.labels[m], stable=True)] for d, m in members.items()}
        visits = [Visit(batch, (batch,)) for m in members.values() for batch in m.split(self.support_size)]
        return [visits] if self.kind == "continual" else [[visit] for visit in visits]

    def scored(self, split: DomainSplit) -> dict[int, Tensor]:
        """The images of each domain that count; domains without any are left out.

        Raises:
            UserError: none are left.
        """
        kept = self.kind != "per domain" or self.score_support
        scored = {d: m if kept else m[self.support_size :] for d, m in self._members(split).items()}
        scored = {domain: counted for domain, counted in scored.items() if len(counted)}
        if not scored:
            few = f"no domain has more than {self.support_size} images, and none is left to score"
            raise UserError(f"evaluation.support_size: {few}")
        return scored

    def _members(self, split: DomainSplit) -> dict[int, Tensor]:
        if self.kind == "per domain" or self.images is None:
            return dict(split.members)
        return {domain: members[: self.images] for domain, members in split.members.items()}
