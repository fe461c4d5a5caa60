"""What every test needs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine's user has cached is neither read nor added to, by other processes neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def wilds_root(tmp_path_factory: pytest.TempPathFactory) -> "WildsRoot":
    """WILDS data sets to read, written when they are first asked for."""
    from wilds_sample import WildsRoot

    return WildsRoot(tmp_path_factory.mktemp("wilds"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a writer that failed may hold a file open


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes begin with Ctrl-C as a terminal gives it to them, even where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
