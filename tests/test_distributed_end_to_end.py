"""Runs of several processes: the same as of one, and what happens when one of them is lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT, SMALL, finish, forget, rows, start, step_of, wait_for_checkpoint, weights

pytestmark = pytest.mark.slow

SHARED = [*SMALL, "meta.domains_per_update=4"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def torchrun(folder: Path, size: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", f"--master_port={free_port()}"]
    command += [f"--max_restarts={restarts}", "--monitor_interval=0.2", "run.py", "--run_dir", str(folder)]
    command += ["--gpu", "-1", "--threads", "1", *SHARED, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def members(folder: Path, size: int) -> list[subprocess.Popen[str]]:
    """Processes of one world that nobody watches over."""
    around = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "run.py", "--run_dir", str(folder), "--gpu", "-1", "--threads", "1", *SHARED]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [subprocess.Popen(command, cwd=ROOT, env={**os.environ, **around, **rank}, **pipes) for rank in ranks]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of those that torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        around = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): child for entry in around if entry.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by one process."""
    folder = tmp_path_factory.mktemp("distributed") / "undisturbed"
    finish(start("run.py", folder, *SHARED))
    return folder


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the undisturbed run, without what meta-training made."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    forget(folder, "meta", "model.json", "results.jsonl", "predictions")
    yield folder
    shutil.rmtree(folder)


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert weights(folder) == weights(undisturbed)
    assert rows(folder) == rows(undisturbed)


def test_run_of_two_processes_from_nothing_is_the_run_of_one(undisturbed: Path, tmp_path: Path) -> None:
    out = finish(torchrun(tmp_path / "run", 2))
    assert_same(tmp_path / "run", undisturbed)
    assert out.count("target domains, adapted to") == 1  # one speaks for both


def test_killed_run_of_two_processes_can_be_gone_on_with_by_four_and_by_one(undisturbed: Path, folder: Path) -> None:
    for size, step in ((2, 5), (4, 12)):
        process = torchrun(folder, size)
        wait_for_checkpoint(process, folder / "meta", step)
        for worker in workers_of(process):
            os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0 and not (folder / "meta" / "manifest.json").exists()
    finish(start("run.py", folder, *SHARED))
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_is_told_by_the_other_within_a_minute(folder: Path, lost: int) -> None:
    processes = members(folder, 2)
    wait_for_checkpoint(processes[0], folder / "meta", 5)
    processes[lost].kill()
    began = time.monotonic()
    _, err = processes[1 - lost].communicate(timeout=60)
    assert time.monotonic() - began < 60
    processes[lost].communicate()
    assert processes[1 - lost].returncode == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "another process of this run has ended" in lines[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize("lost", [0, 1])
def test_torchrun_restarts_after_a_loss_and_the_run_ends_as_if_nothing_had_been(undisturbed: Path, folder: Path, lost: int) -> None:
    process = torchrun(folder, 2, restarts=1)
    wait_for_checkpoint(process, folder / "meta", 10)
    os.kill(workers_of(process)[lost], signal.SIGKILL)
    finish(process)
    assert_same(folder, undisturbed)


def test_sigterm_to_one_process_ends_all_after_the_same_step(undisturbed: Path, folder: Path) -> None:
    processes = members(folder, 2)
    wait_for_checkpoint(processes[0], folder / "meta", 5)
    processes[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], ends
    assert all("interrupted: " in err and "Traceback" not in err for err in ends)
    reached = step_of(folder / "meta" / "checkpoint.safetensors")
    assert 5 <= reached < 24
    finish(start("run.py", folder, *SHARED))
    assert_same(folder, undisturbed)


def test_an_error_of_the_first_process_is_told_once_and_nobody_waits_for_ever(folder: Path) -> None:
    (folder / "student" / "weights.safetensors").write_bytes(b"")
    processes = members(folder, 2)
    ends = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "weights.safetensors: changed or cut off since it was written" in ends[0]
    assert "another process of this run has ended" in ends[1]
