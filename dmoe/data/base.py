"""What every data set looks like to the rest of the house.

Notation: n images in a split, B in a batch, images ``[B, C, H, W]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dmoe.data.transforms import ImageTransform
from dmoe.tasks import Task


class DomainSplit(ABC):
    """The images of one split, by number; each has a label and belongs to a domain.

    Attributes:
        labels: ``[n]``, class numbers (int64) or values (float).
        domains: ``[n]`` int64, the domain an image belongs to in episodes and as a target. Numbers need not be dense.
        group_domains: ``[n]`` int64, the domain by which images are given to experts. Mostly the same as ``domains``;
            where episodes use finer domains than experts do, it is the coarser of the two.
        domain_names: a readable name of each number in ``domains``.
    """

    labels: Tensor
    domains: Tensor
    group_domains: Tensor
    domain_names: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, index: Tensor, *, draw: int | None = None) -> Tensor:
        """The images numbered ``index`` ``[B]``, float32 ``[B, C, H, W]``, ready for a network.

        ``draw=None`` gives the stored view: the same pixels each time, which is what tokens are computed from. A number
        gives a fresh random augmentation, a pure function of it. Data sets without augmentation ignore ``draw``.
        """

    @cached_property
    def members(self) -> dict[int, Tensor]:
        """Image numbers of each domain, ascending: data-set order."""
        order = torch.argsort(self.domains, stable=True)
        ids, counts = torch.unique_consecutive(self.domains[order], return_counts=True)
        return dict(zip(ids.tolist(), torch.split(order, counts.tolist()), strict=True))


class FirstImages(DomainSplit):
    """The first ``count`` images of each domain of another split."""

    def __init__(self, split: DomainSplit, count: int) -> None:
        self._split = split
        self._kept = torch.cat([members[:count] for members in split.members.values()]).sort().values
        self.labels, self.domains = split.labels[self._kept], split.domains[self._kept]
        self.group_domains, self.domain_names = split.group_domains[self._kept], split.domain_names

    def images(self, index: Tensor, *, draw: int | None = None) -> Tensor:
        return self._split.images(self._kept[index], draw=draw)


@dataclass(frozen=True)
class DomainDataset:
    """A multi-domain data set: its splits, its task, and what an image looks like.

    Attributes:
        splits: ``source`` (train here), ``validation`` (choose here) and ``target`` (report here); their domains are disjoint.
        transform: how a picture from elsewhere becomes an image of this data set.
        class_names: one name an output class; empty for a regression.
        fingerprint: changes whenever any pixel, label or split could change.
    """

    name: str
    splits: Mapping[str, DomainSplit]
    task: Task
    transform: ImageTransform
    class_names: Sequence[str]
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.transform.image_shape

    def with_fewer_source_images(self, per_domain: int) -> "DomainDataset":
        """The same with the first ``per_domain`` images of each source domain only."""
        splits = {**self.splits, "source": FirstImages(self.splits["source"], per_domain)}
        return replace(self, splits=splits, fingerprint=f"{self.fingerprint}, first {per_domain} of each source domain")
