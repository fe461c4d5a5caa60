"""What every test needs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from wilds_sample import WildsRoot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # plain `pytest` in a checkout that is not installed


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order, and no more cores than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def wilds_root(tmp_path_factory: pytest.TempPathFactory) -> "WildsRoot":
    """WILDS data sets to read, written when they are first asked for."""
    from wilds_sample import WildsRoot

    return WildsRoot(tmp_path_factory.mktemp("wilds"))
