"""The queue before the GPUs or core shares of one machine."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from noise import run_in

from dmoe.run import Run
from experts import local
from experts.local import Local
from experts.process import End, log_of


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = run_in(tmp_path, "experts.count=5", "experts.threads=2")
    for number in range(5):
        log_of(run, number).parent.mkdir(parents=True)
    return run


@pytest.fixture(autouse=True)
def said_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of training, a process says its flags; a second one would wait."""
    say = "import sys; print(*sys.argv[1:])"
    monkeypatch.setattr(local, "command", lambda run, *flags: [sys.executable, "-S", "-c", say, *flags])


def all_ends(launcher: Local, count: int) -> list[End]:
    ends, began = [], time.monotonic()
    while len(ends) < count:
        assert time.monotonic() - began < 60
        ends += launcher.ended()
        time.sleep(0.01)
    return ends


def flags(run: Run, number: int) -> list[str]:
    words = log_of(run, number).read_text().split()
    assert words[:2] == ["--expert_idx", str(number)] and words[-2:] == ["--parent", str(os.getpid())]
    return words[2:-2]


@pytest.mark.parametrize(("threads", "at_once"), [(4, 2), (5, 2), (1, 1)])
def test_cores_are_shared_out(run: Run, threads: int, at_once: int) -> None:
    launcher = Local(run, gpu=-1, threads=threads)
    assert launcher.start([0, 1, 2]) == at_once
    assert launcher.start([2]) == 0
    assert sorted(all_ends(launcher, at_once)) == [End(number, 0) for number in range(at_once)]
    assert launcher.start([3]) == 1
    launcher.stop()
    assert flags(run, 0) == ["--gpu", "-1", "--threads", "2"]


def test_every_gpu_gets_one_expert_and_its_share_of_the_cores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launcher = Local(run, gpu=None, threads=7)
    assert launcher.start([0, 1, 2]) == 2
    all_ends(launcher, 2)
    assert [flags(run, number) for number in (0, 1)] == [["--gpu", gpu, "--threads", "3"] for gpu in ("0", "1")]


def test_one_gpu_that_was_asked_for_takes_one_expert_after_the_other(run: Run) -> None:
    launcher = Local(run, gpu=1, threads=4)
    assert launcher.start([0, 1]) == 1
    all_ends(launcher, 1)
    assert flags(run, 0) == ["--gpu", "1", "--threads", "4"]


@pytest.mark.parametrize(("line", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", -9)])
def test_status_or_signal_is_told(run: Run, monkeypatch: pytest.MonkeyPatch, line: str, status: int) -> None:
    monkeypatch.setattr(local, "command", lambda run, *flags: [sys.executable, "-S", "-c", f"import os, sys; {line}"])
    launcher = Local(run, gpu=-1, threads=1)
    launcher.start([0])
    assert all_ends(launcher, 1) == [End(0, status)]


def test_stopping_ends_what_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "command", lambda run, *flags: [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    launcher = Local(run, gpu=-1, threads=4)
    launcher.start([0, 1])
    began = time.monotonic()
    launcher.stop()
    assert time.monotonic() - began < 30
    assert [end.status for end in launcher.ended()] == [-15, -15]


def test_log_of_an_earlier_try_is_kept(run: Run) -> None:
    log_of(run, 0).write_text("step 20/60\n")
    launcher = Local(run, gpu=-1, threads=1)
    launcher.start([0])
    all_ends(launcher, 1)
    assert log_of(run, 0).read_text().startswith("step 20/60\n--expert_idx 0")
