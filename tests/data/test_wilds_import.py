"""What the stock package is given to run beside today's libraries: a mean over groups, a silent import, timestamps."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor

from dmoe.data import wilds_import
from dmoe.data.wilds_import import fractional_seconds, wilds

ROOT = Path(__file__).resolve().parent.parent.parent
WHOLE, FRACTIONAL = "2016-02-03T04:05:06Z", "2016-02-03T04:05:06.789Z"
SECONDS_AT_MOST = 60
"""Safety only: a process that waits for a thread would never end."""


@pytest.fixture
def without_torch_scatter(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if it had not been imported yet."""
    monkeypatch.delitem(sys.modules, "torch_scatter", raising=False)
    return monkeypatch


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    """Let Python's own search for torch_scatter find something, or nothing."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        if name == "torch_scatter":
            return importlib.util.spec_from_loader(name, loader=None) if installed else None
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def means_of_groups(values: Tensor, groups: Tensor, count: int) -> list[float]:
    """By a loop; 0 for a group of nothing, as torch-scatter has it."""
    members: list[list[float]] = [[] for _ in range(count)]
    for value, group in zip(values.tolist(), groups.tolist(), strict=True):
        members[group].append(value)
    return [sum(found) / len(found) if found else 0.0 for found in members]


@pytest.mark.parametrize(("images", "groups"), [(1, 1), (40, 7), (40, 100), (0, 3)])
def test_stand_in_averages_over_groups_as_a_loop_does(without_torch_scatter: pytest.MonkeyPatch, images: int, groups: int) -> None:
    pretend_installed(without_torch_scatter, installed=False)
    wilds()
    scatter = sys.modules["torch_scatter"].scatter
    values, index = torch.randn(images, dtype=torch.float64), torch.randint(groups, (images,))
    found = scatter(src=values, index=index, dim_size=groups, reduce="mean")
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(means_of_groups(values, index, groups), abs=1e-15)


def test_stock_averages_go_through_it(without_torch_scatter: pytest.MonkeyPatch) -> None:
    pretend_installed(without_torch_scatter, installed=False)
    wilds()
    from wilds.common.utils import avg_over_groups

    averages, counts = avg_over_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([2, 0, 0, 2]), 4)
    assert averages.tolist() == [0.5, 0.0, 1.0, 0.0]
    assert counts.tolist() == [2, 0, 2, 0]


def test_installed_torch_scatter_is_left_to_the_stock_package(without_torch_scatter: pytest.MonkeyPatch) -> None:
    pretend_installed(without_torch_scatter, installed=True)
    wilds()
    assert "torch_scatter" not in sys.modules


def test_imported_torch_scatter_is_not_replaced(without_torch_scatter: pytest.MonkeyPatch) -> None:
    pretend_installed(without_torch_scatter, installed=False)
    theirs = ModuleType("torch_scatter")
    without_torch_scatter.setitem(sys.modules, "torch_scatter", theirs)
    wilds()
    assert sys.modules["torch_scatter"] is theirs


def test_import_starts_no_thread_asks_nobody_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    (tmp_path / "outdated.py").write_text(
        "import time\nprint('imported outdated')\n\n\ndef check_outdated(*_):\n    time.sleep(3600)\n"
    )
    lines = [
        "import threading",
        "from dmoe.data.wilds_import import wilds",
        "print(wilds().__version__)",
        "import wilds.datasets.iwildcam_dataset",
        "print(threading.active_count())",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_AT_MOST,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [wilds().__version__, "1"]


def test_imported_outdated_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("outdated")
    monkeypatch.setitem(sys.modules, "outdated", theirs)
    wilds()
    assert sys.modules["outdated"] is theirs


@pytest.mark.parametrize("first", [WHOLE, FRACTIONAL])
def test_timestamps_with_and_without_fractions_are_read_together(first: str) -> None:
    texts = pandas.Series([first, WHOLE, FRACTIONAL])
    with fractional_seconds():
        read = pandas.to_datetime(texts)
    assert [moment.timestamp() % 60 for moment in read] == pytest.approx([6.789 if first == FRACTIONAL else 6, 6, 6.789], abs=1e-4)
    assert {(moment.year, moment.month, moment.day, moment.hour, moment.minute) for moment in read} == {(2016, 2, 3, 4, 5)}


def test_format_that_is_asked_for_is_kept() -> None:
    with fractional_seconds():
        read = pandas.to_datetime("03/02/2016", format="%d/%m/%Y")
    assert (read.day, read.month) == (3, 2)


def test_pandas_is_as_before_afterwards() -> None:
    before = pandas.to_datetime
    with fractional_seconds():
        assert pandas.to_datetime is not before
    assert pandas.to_datetime is before


def test_pandas_is_as_before_after_an_error() -> None:
    before = pandas.to_datetime
    with pytest.raises(ValueError, match="not a time"), fractional_seconds():
        pandas.to_datetime("not a time")
    assert pandas.to_datetime is before


def test_package_that_is_not_there_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wilds", None)
    with pytest.raises(ImportError):
        wilds_import.wilds()
