"""What every test needs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # plain `pytest` in a checkout that is not installed


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order, and no more cores than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
