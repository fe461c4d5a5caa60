"""Data sets by the name that the command line knows."""

from collections.abc import Callable

from dmoe.config import DataConfig
from dmoe.data.base import DomainDataset
from dmoe.errors import UserError


def load_dataset(name: str, config: DataConfig) -> DomainDataset:
    """Open a data set.

    Raises:
        UserError: unknown name, or the data cannot be read.
    """
    if name not in _LOADERS:
        raise UserError(f"dataset: {name!r} is unknown; known: {', '.join(_LOADERS)}")
    dataset = _LOADERS[name](config)
    if config.source_images_per_domain is not None:
        dataset = dataset.with_fewer_source_images(config.source_images_per_domain)
    return dataset


def _digits(config: DataConfig) -> DomainDataset:
    from dmoe.data import digits

    return digits.load(seed=config.seed)


_LOADERS: dict[str, Callable[[DataConfig], DomainDataset]] = {"digits": _digits}
