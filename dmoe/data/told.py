"""A data set whose images say which domain they are of: what an oracle sees that is told the domain."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.errors import DoesNotApply


class ToldDomain(DomainSplit):
    """The images of another split, each with one more constant channel for every number that describes its domain."""

    def __init__(self, split: DomainSplit, descriptors: Mapping[int, Tensor]) -> None:
        self._split = split
        self.labels, self.domains, self.group_domains = split.labels, split.domains, split.group_domains
        self.domain_names, self.views, self.descriptors = split.domain_names, split.views, descriptors
        numbers, self._position = split.domains.unique(return_inverse=True)
        self._told = torch.stack([descriptors[number] for number in numbers.tolist()])

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        images = self._split.images(index, view=view, draw=draw)
        told = self._told[self._position[index]].to(images.dtype)
        return torch.cat([images, told[:, :, None, None].expand(*told.shape, *images.shape[2:])], dim=1)

    def name(self, number: int) -> str:
        return self._split.name(number)

    @property
    def group_names(self) -> Mapping[int, str]:
        return self._split.group_names


def told_domain(dataset: DomainDataset) -> DomainDataset:
    """The data set with all its images told their domain; pictures from elsewhere are not.

    Raises:
        DoesNotApply: nothing is known of its domains.
    """
    splits: dict[str, DomainSplit] = {}
    told = 0
    for name, split in dataset.splits.items():
        if split.descriptors is None:
            raise DoesNotApply(f"{dataset.name}: no numbers are known that describe its domains: an oracle cannot be told them")
        splits[name] = ToldDomain(split, split.descriptors)
        told = len(next(iter(split.descriptors.values())))
    return replace(dataset.with_more_channels(told), splits=splits, fingerprint=f"{dataset.fingerprint}, told the domain")
