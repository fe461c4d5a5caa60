"""Processes that need one another's results: each starts when there is room and what it needs is done."""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from dmoe.console import progress_bar, say
from dmoe.errors import UserError
from dmoe.interruption import Interrupted

POLL_SECONDS = 0.1

IMPORTED_ONCE = ("torch", "torch._dynamo", "sklearn.metrics")
"""What every task needs and is slow to import, where processes can be copies of one that has it already."""


@dataclass(frozen=True)
class Task:
    """A Python program to run.

    Attributes:
        arguments: of the interpreter: a file, or ``-m`` and a module, or ``-c`` and a program; and what it is given.
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
    waiting, running, done = dict(tasks), dict[str, BaseProcess](), set[str]()
    failed: dict[str, int | None] = {}
    with progress_bar(name, total=len(tasks), unit="task") as bar:
        try:
            while running or any(_ready(task, done) for task in waiting.values()):
                for each in [each for each, task in waiting.items() if _ready(task, done)][: at_once - len(running)]:
                    running[each] = _started(waiting.pop(each), logs / f"{each}.txt")
                time.sleep(POLL_SECONDS)
                for each in [each for each, process in running.items() if process.exitcode is not None]:
                    status = running.pop(each).exitcode
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
                process.join()
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


def _started(task: Task, log: Path) -> BaseProcess:
    # A fork of a process of one thread that has done nothing yet; elsewhere than on Linux, system libraries may not bear it.
    linux = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver") if linux else multiprocessing.get_context("spawn")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    process = context.Process(target=_work, args=(list(task.arguments), str(log)))
    process.start()
    return process


def _work(arguments: Sequence[str], log: str) -> None:
    """In the process of a task: do what ``python`` does with these arguments."""
    with open(log, "ab") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<task>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def _end_with_parent() -> None:
    """Ask this process to end when the one that runs the tasks has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else "it said nothing").removeprefix("error: ")[:300]
