"""Data sets by the name that the command line knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoe.config import DataConfig
from dmoe.data.base import DomainDataset
from dmoe.errors import UserError

DEFAULT_FOLDER = Path("data")


@dataclass(frozen=True)
class Opening:
    """How a data set is opened, which leaves what it is alone.

    Attributes:
        workers: processes to read images with, where all have to be read.
        known_unreadable: images that cannot be read, found by an earlier visit; None: not known.
        download: fetch what is not there.
    """

    workers: int = 0
    known_unreadable: Sequence[str] | None = None
    download: bool = True


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

    return digits.load(seed=config.seed)


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
        download=opening.download,
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
    )


_LOADERS: dict[str, Callable[[str, DataConfig, Opening], DomainDataset]] = {
    "digits": _digits,
    **dict.fromkeys(("iwildcam", "camelyon", "rxrx1", "fmow", "poverty"), _wilds),
    "folders": _folders,
}
