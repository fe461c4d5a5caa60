"""Data sets by the name that the command line knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dmoe.config import DataConfig
from dmoe.data.base import DomainDataset
from dmoe.data.decoded import Keeping
from dmoe.errors import UserError
from dmoe.memory import memory_budget

DEFAULT_FOLDER = Path("data")


@dataclass(frozen=True)
class Opening:
    """How a data set is opened, which leaves what it is alone.

    Attributes:
        workers: processes to read images with, where all have to be read.
        known_unreadable: images that cannot be read, found by an earlier visit; None: not known.
        writes: fetch what is not there, and keep images once they are decoded.
    """

    workers: int = 0
    known_unreadable: Sequence[str] | None = None
    writes: bool = True


def load_dataset(name: str, config: DataConfig, opening: Opening | None = None) -> DomainDataset:
    """Open a data set.

    Raises:
        UserError: unknown name, or the data cannot be read.
    """
    if name not in _LOADERS:
        raise UserError(f"dataset: {name!r} is unknown; known: {', '.join(_LOADERS)}")
    dataset = _LOADERS[name](name, config, opening or Opening())
    if config.source_images_per_domain is not None:
        dataset = dataset.with_fewer_source_images(config.source_images_per_domain)
    return dataset


def _digits(name: str, config: DataConfig, opening: Opening) -> DomainDataset:
    from dmoe.data import digits

    return digits.load(seed=config.seed, angles=config.angles)


def _wilds(name: str, config: DataConfig, opening: Opening) -> DomainDataset:
    from dmoe.data import wilds

    return wilds.load(
        name,
        root=config.dir or DEFAULT_FOLDER,
        fold=config.fold,
        image_size=config.image_size,
        skip_unreadable=config.skip_unreadable,
        known_unreadable=opening.known_unreadable,
        workers=opening.workers,
        download=opening.writes,
        keeping=_keeping(config, opening),
    )


def _folders(name: str, config: DataConfig, opening: Opening) -> DomainDataset:
    from dmoe.data import folders

    return folders.load(
        config.dir or DEFAULT_FOLDER,
        target_domains=config.target_domains,
        validation_domains=config.validation_domains,
        validation_fraction=config.validation_fraction,
        labels=config.labels,
        image_size=config.image_size or 224,
        channels=config.channels,
        augmentation=config.augmentation,
        seed=config.seed,
        skip_unreadable=config.skip_unreadable,
        known_unreadable=opening.known_unreadable,
        workers=opening.workers,
        keeping=_keeping(config, opening),
    )


def _keeping(config: DataConfig, opening: Opening) -> Keeping | None:
    limit = memory_budget(torch.device("cpu")) if config.decoded_gb is None else int(config.decoded_gb * 1e9)
    if limit == 0:
        return None
    where = config.dir or DEFAULT_FOLDER
    folder = config.decoded_dir or (where.parent if where.is_file() else where) / ".decoded"
    return Keeping(folder, limit, fills=opening.writes)


_LOADERS: dict[str, Callable[[str, DataConfig, Opening], DomainDataset]] = {
    "digits": _digits,
    **dict.fromkeys(("iwildcam", "camelyon", "rxrx1", "fmow", "poverty"), _wilds),
    "folders": _folders,
}
