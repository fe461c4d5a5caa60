"""A process that was started for another's sake ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system's part in this is Linux's")

CHILD = "import sys, time; from dmoe.machine import end_with; end_with({parent}); print('ready', flush=True); time.sleep(600)"


def alive(process: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_child_ends_when_its_parent_is_killed() -> None:
    child = CHILD.format(parent="int(sys.argv[1])")
    start = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline().strip(), child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", start, child], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ready, number = parent.stdout.readline().split()
        assert ready == "ready" and alive(int(number))
        parent.kill()
        parent.wait()
        began = time.monotonic()
        while alive(int(number)):
            assert time.monotonic() - began < 30
            time.sleep(0.01)


def test_child_whose_parent_is_gone_already_ends_at_once() -> None:
    gone = os.getppid()  # anybody but the process that starts it
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format(parent=gone)], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout == b""
