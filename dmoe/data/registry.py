"""Data sets by the name that the command line knows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dmoe.config import DataConfig
from dmoe.data.base import DomainDataset
from dmoe.errors import UserError

DEFAULT_FOLDER = Path("data")


def load_dataset(
    name: str, config: DataConfig, *, workers: int = 0, known_unreadable: Sequence[str] | None = None
) -> DomainDataset:
    """Open a data set.

    Args:
        workers: processes to read images with, where all have to be read.
        known_unreadable: images that cannot be read, found by an earlier visit; None: not known.

    Raises:
        UserError: unknown name, or the data cannot be read.
    """
    if name not in _LOADERS:
        raise UserError(f"dataset: {name!r} is unknown; known: {', '.join(_LOADERS)}")
    dataset = _LOADERS[name](name, config, workers, known_unreadable)
    if config.source_images_per_domain is not None:
        dataset = dataset.with_fewer_source_images(config.source_images_per_domain)
    return dataset


def _digits(name: str, config: DataConfig, workers: int, known_unreadable: Sequence[str] | None) -> DomainDataset:
    from dmoe.data import digits

    return digits.load(seed=config.seed)


def _wilds(name: str, config: DataConfig, workers: int, known_unreadable: Sequence[str] | None) -> DomainDataset:
    from dmoe.data import wilds

    return wilds.load(
        name,
        root=config.dir or DEFAULT_FOLDER,
        fold=config.fold,
        image_size=config.image_size,
        skip_unreadable=config.skip_unreadable,
        known_unreadable=known_unreadable,
        workers=workers,
    )


def _folders(name: str, config: DataConfig, workers: int, known_unreadable: Sequence[str] | None) -> DomainDataset:
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
        known_unreadable=known_unreadable,
        workers=workers,
    )


_LOADERS: dict[str, Callable[[str, DataConfig, int, Sequence[str] | None], DomainDataset]] = {
    "digits": _digits,
    **dict.fromkeys(("iwildcam", "camelyon", "rxrx1", "fmow", "poverty"), _wilds),
    "folders": _folders,
}
