"""Data sets by the name that the command line knows."""

from dmoe.config import DataConfig
from dmoe.data.base import DomainDataset
from dmoe.errors import UserError


def load_dataset(name: str, config: DataConfig) -> DomainDataset:
    """Open a data set.

    Raises:
        UserError: unknown name, or the data cannot be read.
    """
    if name == "digits":
        from dmoe.data import digits

        return digits.load(seed=config.seed)
    raise UserError(f"dataset: {name!r} is unknown; known: digits")
