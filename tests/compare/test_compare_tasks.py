"""Processes that need one another's results."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from told import one_line

from dmoe.compare.tasks import Task, run_tasks
from dmoe.errors import UserError


def note(path: Path, word: str, *, seconds: float = 0.0, status: int = 0) -> list[str]:
    """A program that writes when it began and ended into a file, says a word and ends with a status."""
    code = (
        "import sys, time, pathlib\n"
        f"began = time.monotonic(); time.sleep({seconds})\n"
        f"pathlib.Path({str(path)!r}).write_text(f'{{began}} {{time.monotonic()}}')\n"
        f"print({word!r}); sys.exit({status})"
    )
    return ["-c", code]


def span(path: Path) -> tuple[float, float]:
    began, ended = map(float, path.read_text().split())
    return began, ended


def test_a_task_starts_when_what_it_needs_has_ended(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    tasks = {
        "c": Task(note(paths[2], "c"), needs=["a", "b"]),
        "a": Task(note(paths[0], "a", seconds=0.2)),
        "b": Task(note(paths[1], "b", seconds=0.2)),
    }
    run_tasks(tasks, at_once=2, logs=tmp_path / "logs", name="test")
    (a, a_ended), (b, b_ended), (c, _) = map(span, paths)
    assert c >= max(a_ended, b_ended)
    assert max(a, b) < min(a_ended, b_ended), "these two at once"
    assert (tmp_path / "logs" / "c.txt").read_text() == "c\n"


def test_no_more_run_at_once_than_were_allowed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    run_tasks({path.name: Task(note(path, "", seconds=0.1)) for path in paths}, at_once=1, logs=tmp_path / "logs", name="test")
    spans = sorted(map(span, paths))
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_failure_leaves_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    tasks = {
        "bad": Task(note(tmp_path / "bad", "error: no such thing: make one", status=2)),
        "after": Task(note(tmp_path / "after", ""), needs=["bad"]),
        "other": Task(note(tmp_path / "other", "")),
    }
    with pytest.raises(UserError) as error:
        run_tasks(tasks, at_once=1, logs=tmp_path / "logs", name="test")
    assert "1 of 3 tasks failed, 1 were not started: bad: no such thing: make one" in one_line(error)
    assert (tmp_path / "other").exists() and not (tmp_path / "after").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the system's signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_an_interrupted_or_lost_comparison_ends_its_processes(name: str, tmp_path: Path) -> None:
    child = tmp_path / "child"
    sleeping = f"import os, time, pathlib; pathlib.Path({str(child)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "from pathlib import Path\n"
        "from dmoe.interruption import heed_signals\n"
        "from dmoe.compare.tasks import Task, run_tasks\n"
        "heed_signals()\n"
        f"run_tasks({{'a': Task(['-c', {sleeping!r}])}}, at_once=1, logs=Path({str(tmp_path / 'logs')!r}), name='test')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not (child.exists() and child.read_text()) and time.monotonic() - began < 60:
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    assert process.wait(timeout=30) != 0
    while _lives(int(child.read_text())):
        assert time.monotonic() - began < 60
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
