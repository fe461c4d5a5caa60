"""Experts on a Ray cluster: each is a task on one GPU or some CPUs, and Ray finds the node.

All nodes share the file system of the run folder, the data and the current folder, and have the same Python at the same path.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoe.errors import UserError
from dmoe.run import Run
from experts.process import End, command, log_of

RETRIES_OF_LOST_WORKERS = 3
"""By Ray itself, on another node; after them comes the launcher's own retry."""

SECONDS_TO_ANSWER = 20.0

SECONDS_TO_STOP = 60.0
"""How long to wait for processes that were asked to stop."""


class RayCluster:
    """The cluster of ``RAY_ADDRESS``, or the one that runs on this machine, or one that is started on it for this run.

    Args:
        gpu: -1: none; otherwise each expert gets a GPU where the cluster has any.

    Raises:
        UserError: Ray is not installed, cannot be reached, or no node is large enough.
    """

    poll_seconds = 0.5

    def __init__(self, run: Run, *, gpu: int | None) -> None:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            import ray
        except ImportError:
            raise UserError("--launcher ray: Ray is not installed: pip install ray") from None
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
        try:
            ray.init(log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--launcher ray: no cluster can be reached: {str(error).splitlines()[0]}") from None
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own there
        self._ray: Any = ray
        self._run = run
        self._running: dict[Any, int] = {}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._gpus, self._cpus = (0, run.config.experts.threads) if gpu == -1 else _share(nodes, run.config.experts.threads)
        if not any(node.get("CPU", 0) >= self._cpus for node in nodes):
            ray.shutdown()
            raise UserError(f"experts.threads: {self._cpus} CPUs are more than any node of the Ray cluster has")
        self._task = ray.remote(_task()).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=RETRIES_OF_LOST_WORKERS, scheduling_strategy="SPREAD"
        )
        each = f"{'1 GPU and ' if self._gpus else ''}{self._cpus} CPU{'s' if self._cpus > 1 else ''}"
        self.place = f"each on {each} of a Ray cluster of {len(nodes)} node{'s' if len(nodes) > 1 else ''}"

    def start(self, numbers: Sequence[int]) -> int:
        for number in numbers:
            flags = ("--expert_idx", str(number), "--gpu", "0" if self._gpus else "-1", "--threads", str(self._cpus))
            log = log_of(self._run, number).absolute()
            self._running[self._task.remote(command(self._run, *flags), log, Path.cwd())] = number
        return len(numbers)

    def ended(self) -> list[End]:
        if not self._running:
            return []
        ends = []
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for task in done:
            number = self._running.pop(task)
            try:
                ends.append(End(number, self._ray.get(task)))
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, OSError):
                    raise
                raise UserError(f"--launcher ray: {error.cause}") from None
            except self._ray.exceptions.RayError:  # Ray's own retries are spent
                ends.append(End(number, None))
        return ends

    def stop(self) -> None:
        for task in self._running:
            self._ray.cancel(task)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=SECONDS_TO_STOP)
        self._ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself tries for minutes to reach a ``host:port`` where nobody answers."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "//" in host:
        return  # what else Ray understands: auto, local, the address of a client
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise UserError(f"--launcher ray: no cluster at RAY_ADDRESS={address}: {error.strerror or error}") from None


def _share(nodes: Sequence[dict[str, float]], threads: int) -> tuple[int, int]:
    """GPUs and CPUs for an expert: a GPU with its share of its node's CPUs, or, where there is no GPU, ``threads`` CPUs."""
    shares = [int(node.get("CPU", 0) / node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
    return (1, max(1, min(shares))) if shares else (0, threads)


def _task() -> Any:
    """What a node does for an expert. A function inside a function travels by value, so nodes need not find this package."""

    def train(command: list[str], log: Path, folder: Path) -> int:
        try:
            with open(log, "ab") as file:  # its folder is there, or the file system is not the same
                process = subprocess.Popen(
                    [*command, "--parent", str(os.getpid())],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
        except OSError as error:
            where = f"{socket.gethostname()}: {error.filename}: {error.strerror}"
            raise OSError(f"{where}: all nodes must share the file systems of the run folder, the code and Python") from None
        try:
            while process.poll() is None:  # Ray cancels between two lines of Python
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        return process.returncode

    return train
