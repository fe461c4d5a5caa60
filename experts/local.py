"""Experts on this machine: a process a GPU, or as many as the cores can feed."""

import os
import subprocess
from collections.abc import Sequence

import torch

from dmoe.machine import cores
from dmoe.run import Run
from experts.process import End, command, log_of


class Local:
    """A queue before the GPUs or core shares of this machine.

    Args:
        gpu: the one GPU to use, -1 for none; None: every visible one.
        threads: CPU threads for all trainings together; None: every core.
    """

    poll_seconds = 0.2

    def __init__(self, run: Run, *, gpu: int | None, threads: int | None) -> None:
        self._run = run
        available, self._threads = threads or cores(), run.config.experts.threads
        if gpu is None and torch.cuda.is_available():
            self._free = [str(number) for number in range(torch.cuda.device_count())]
        elif gpu is not None and gpu >= 0:
            self._free = [str(gpu)]
        else:
            self._free = ["-1"] * max(1, available // self._threads)
        if self._free[0] != "-1":
            self._threads = max(1, available // len(self._free))
        self.place = f"{len(self._free)} at a time on this machine"
        self._running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}

    def start(self, numbers: Sequence[int]) -> int:
        started = list(numbers[: len(self._free)])
        for number in started:
            gpu = self._free.pop(0)
            flags = ("--expert_idx", str(number), "--gpu", gpu, "--threads", str(self._threads), "--parent", str(os.getpid()))
            with open(log_of(self._run, number), "ab") as log:
                process = subprocess.Popen(
                    command(self._run, *flags), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            self._running[number] = gpu, process
        return len(started)

    def ended(self) -> list[End]:
        ends = [End(number, process.returncode) for number, (_, process) in self._running.items() if process.poll() is not None]
        self._free += [self._running.pop(end.number)[0] for end in ends]
        return ends

    def stop(self) -> None:
        for _, process in self._running.values():
            process.terminate()
        for _, process in self._running.values():
            process.wait()
