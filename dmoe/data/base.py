"""What every data set looks like to the rest of the house.

Notation: n images in a split, B in a batch, images ``[B, C, H, W]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dmoe.data.decoded import DecodedImages
from dmoe.data.transforms import ImageTransform
from dmoe.tasks import Task

SHOWN = 4
"""Names in a message; of the others the number is told."""


class DomainSplit(ABC):
    """The images of one split, by number; each has a label and belongs to a domain.

    Attributes:
        labels: ``[n]``, class numbers (int64) or values (float).
        domains: ``[n]`` int64, the domain an image belongs to in episodes and as a target. Numbers need not be dense.
        group_domains: ``[n]`` int64, the domain by which images are given to experts. Mostly the same as ``domains``;
            where episodes use finer domains than experts do, it is the coarser of the two.
        domain_names: a readable name of each number in ``domains``.
        views: how many stored views an image has; view 0 is the image as it is.
        descriptors: numbers ``[n]`` that describe each domain, where the maker of the data set knows any; about as large as the
            values of an image.
    """

    labels: Tensor
    domains: Tensor
    group_domains: Tensor
    domain_names: Mapping[int, str]
    views: int = 1
    descriptors: Mapping[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def group_names(self) -> Mapping[int, str]:
        """A readable name of each number in ``group_domains``."""
        return self.domain_names

    @abstractmethod
    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        """The images numbered ``index`` ``[B]``, float32 ``[B, C, H, W]``, ready for a network.

        ``draw=None`` gives stored views, the same pixels each time, which is what tokens are computed from: for each image the
        one that ``view`` ``[B]`` says, or view 0. A number gives a fresh random augmentation instead, a pure function of it.
        Data sets without augmentation ignore ``draw``.

        Raises:
            UserError: an image cannot be read.
        """

    def pixels(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        """The same images as small as they can be, for one process to send to another; :meth:`finish` makes them ready."""
        return self.images(index, view=view, draw=draw)

    def finish(self, pixels: Tensor) -> Tensor:
        """Images as :meth:`images` gives them, from what :meth:`pixels` gave, on whatever device that is now."""
        return pixels

    def name(self, number: int) -> str:
        """What people know an image by: its file, where it has one."""
        return f"image {number}"

    def describe(self, index: Tensor) -> str:
        """In a few words, which images ``[B]`` and of which domains."""
        domains = [self.domain_names.get(d, str(d)) for d in self.domains[index].unique().tolist()]
        images = [self.name(number) for number in index[:SHOWN].tolist()]
        kind = "domain" if len(domains) == 1 else "domains"
        return f"{kind} {_some(domains, len(domains))}: {_some(images, len(index))}"

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
        self.views, self.descriptors = split.views, split.descriptors

    def name(self, number: int) -> str:
        return self._split.name(int(self._kept[number]))

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self._split.images(self._kept[index], view=view, draw=draw)

    @property
    def group_names(self) -> Mapping[int, str]:
        return self._split.group_names

    def pixels(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self._split.pixels(self._kept[index], view=view, draw=draw)

    def finish(self, pixels: Tensor) -> Tensor:
        return self._split.finish(pixels)


def _some(names: Sequence[str], count: int) -> str:
    left = count - len(names[:SHOWN])
    return ", ".join(names[:SHOWN]) + (f" and {left} more" if left else "")


OfficialMetrics = Callable[[str, Tensor, Tensor], Mapping[str, float]]
"""(name of a split, image numbers ``[B]``, predictions ``[B]``) to the metrics that the data set's own makers defined."""


@dataclass(frozen=True)
class DomainDataset:
    """A multi-domain data set: its splits, its task, and what an image looks like.

    Attributes:
        splits: ``source`` (train here), ``validation`` (choose here) and ``target`` (report here), perhaps others to test on. The
            target's domains are in no other of the three.
        transform: how a picture from elsewhere becomes an image of this data set.
        class_names: one name an output class; empty for a regression.
        fingerprint: changes whenever any pixel, label or split could change.
        official_metrics: the data set's own metrics over all images of a split; None: those of the task.
        selection_metric: the one of them by which checkpoints are chosen, higher is better; empty: the task's.
        reported: those that are printed, each with the name that people know it by; empty: the selection metric.
        official_name: what the data set is called by its makers, where that differs.
        official_splits: what its splits are called by them.
        replicate: which of several ways to split it this is, as leaderboards name it; empty: there is one.
        in_memory: whether images are there at once, so that no process needs to read ahead.
        unreadable: images that were left out because they cannot be read.
        decoded: where images are kept once they are decoded; None: nowhere.
    """

    name: str
    splits: Mapping[str, DomainSplit]
    task: Task
    transform: ImageTransform
    class_names: Sequence[str]
    fingerprint: str
    official_metrics: OfficialMetrics | None = None
    selection_metric: str = ""
    reported: Mapping[str, str] = field(default_factory=dict)
    official_name: str = ""
    official_splits: Mapping[str, str] = field(default_factory=dict)
    replicate: str = ""
    in_memory: bool = True
    unreadable: Sequence[str] = ()
    decoded: DecodedImages | None = None

    def __post_init__(self) -> None:
        if not self.selection_metric:
            object.__setattr__(self, "selection_metric", self.task.headline)
        if not self.reported:
            object.__setattr__(self, "reported", {self.selection_metric: self.selection_metric})

    def metrics(self, split: str, index: Tensor, predictions: Tensor) -> Mapping[str, float]:
        """All metrics over images ``index`` ``[B]`` of a split, predicted as ``predictions`` ``[B]``."""
        if self.official_metrics is not None:
            return self.official_metrics(split, index, predictions)
        return self.task.metrics(predictions, self.splits[split].labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.transform.image_shape

    def with_more_channels(self, count: int) -> "DomainDataset":
        """The same for networks that take ``count`` further channels, which somebody else puts behind those of an image."""
        channels, height, width = self.image_shape
        return replace(self, transform=replace(self.transform, image_shape=(channels + count, height, width)))

    def with_fewer_source_images(self, per_domain: int) -> "DomainDataset":
        """The same with the first ``per_domain`` images of each source domain only."""
        splits = {**self.splits, "source": FirstImages(self.splits["source"], per_domain)}
        return replace(self, splits=splits, fingerprint=f"{self.fingerprint}, first {per_domain} of each source domain")
