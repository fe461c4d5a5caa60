"""Processes that need one another's results: each starts when there is room and what it needs is done."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoe.console import progress_bar, say
from dmoe.errors import UserError
from dmoe.interruption import Interrupted

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Task:
    """A Python program to run.

    Attributes:
        arguments: of the interpreter.
        needs: names of tasks that must have ended well before.
    """

    arguments: Sequence[str]
    needs: Sequence[str] = ()


def run_tasks(tasks: Mapping[str, Task], *, at_once: int, logs: Path, name: str) -> None:
    """Run all tasks, in their order as far as they need not wait for one another, so many at a time.

    What a task says goes into ``LOGS/NAME.txt``. When one fails, those that need it are left, all others are still run.

    Raises:
        UserError: some failed; the line says why the first one did.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, done = dict(tasks), dict[str, subprocess.Popen[bytes]](), set[str]()
    failed: dict[str, int] = {}
    with progress_bar(name, total=len(tasks), unit="task") as bar:
        try:
            while running or any(_ready(task, done) for task in waiting.values()):
                for each in [each for each, task in waiting.items() if _ready(task, done)][: at_once - len(running)]:
                    running[each] = _started(waiting.pop(each), logs / f"{each}.txt")
                time.sleep(POLL_SECONDS)
                for each in [each for each, process in running.items() if process.poll() is not None]:
                    status = running.pop(each).returncode
                    bar.update()
                    if status:
                        failed[each] = status
                        say(f"{name}: {each} failed: {_last_line(logs / f'{each}.txt')}")
                    else:
                        done.add(each)
                        say(f"{name}: {len(done)} of {len(tasks)} done: {each}")
        except (Interrupted, KeyboardInterrupt):
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            raise
    if failed:
        first = next(iter(failed))
        left = f", {len(waiting)} were not started" if waiting else ""
        raise UserError(
            f"{name}: {len(failed)} of {len(tasks)} tasks failed{left}: {first}: {_last_line(logs / f'{first}.txt')} "
            f"({logs}); the same command goes on"
        )


def _ready(task: Task, done: set[str]) -> bool:
    return all(need in done for need in task.needs)


def _started(task: Task, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, *task.arguments, "--parent", str(os.getpid())]
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else "it said nothing").removeprefix("error: ")[:300]
