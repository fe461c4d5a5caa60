"""All experts of a run, side by side: a process each, one per GPU or as many as the cores can feed."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from dmoe.console import progress_bar, say
from dmoe.errors import UserError
from dmoe.machine import cores
from dmoe.stages import Run

SCRIPT = Path(__file__).resolve().parent.parent / "train_single_expert.py"
LOG_LINES_SHOWN = 5
POLL_SECONDS = 0.2


@dataclass
class _Training:
    """One expert's process and what it says."""

    number: int
    process: subprocess.Popen[bytes]
    log_path: Path
    log: IO[bytes]

    def steps_done(self) -> int:
        found = re.findall(r"^step (\d+)/", "\n".join(_last_lines(self.log_path, 2)), re.MULTILINE)
        return int(found[-1]) if found else 0


def train_all_experts(run: Run, *, gpu: int | None = None, threads: int | None = None) -> None:
    """Train every expert that is not finished yet.

    Args:
        gpu: the one GPU to use, -1 for none; None: every visible one.
        threads: CPU threads for all trainings together; None: every core.

    Raises:
        UserError: a training failed; the others were finished first, and the line shows the end of its log.
    """
    config = run.config.experts
    waiting = [number for number in range(config.count) if run.expert_stage(number).finished() is None]
    if not waiting:
        say(f"experts: all {config.count} already finished from the same inputs ({run.folder.path / 'experts'})")
        return
    places = _places(gpu, cores=threads or cores(), threads=config.threads)
    say(f"experts: {len(waiting)} of {config.count} to train, {min(len(places), len(waiting))} at a time")
    share = config.threads if not _is_gpu(places[0]) else max(1, (threads or cores()) // len(places))
    steps = _steps_of(run)
    total, finished_steps, failed = sum(steps[number] for number in waiting), 0, []
    running: dict[str, _Training] = {}
    began = time.perf_counter()
    try:
        with progress_bar("experts", total=total) as bar:
            while waiting or running:
                for place in places:
                    if place not in running and waiting:
                        running[place] = _start(run, waiting.pop(0), place, threads=share)
                time.sleep(POLL_SECONDS)
                for place, training in list(running.items()):
                    if training.process.poll() is None:
                        continue
                    training.log.close()
                    del running[place]
                    finished_steps += steps[training.number]
                    if training.process.returncode != 0:
                        failed.append(training)
                    else:
                        say(*_last_lines(training.log_path, 1))
                bar.n = finished_steps + sum(training.steps_done() for training in running.values())
                bar.refresh()
    finally:
        for training in running.values():
            training.process.terminate()
        for training in running.values():
            training.process.wait()
            training.log.close()
    if failed:
        first = failed[0]
        end = " | ".join(_last_lines(first.log_path, LOG_LINES_SHOWN))
        raise UserError(
            f"expert {first.number} failed with status {first.process.returncode}"
            + (f", and {len(failed) - 1} more" if len(failed) > 1 else "")
            + f"; the finished ones are kept. The end of {first.log_path}: {end}"
        )
    say(f"experts: {time.perf_counter() - began:.0f} s in all")


def _places(gpu: int | None, *, cores: int, threads: int) -> list[str]:
    """Where a training can run: GPU numbers, or names of CPU shares."""
    if gpu is not None and gpu >= 0:
        return [str(gpu)]
    if torch.cuda.is_available() and gpu is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [f"cpu{share}" for share in range(max(1, cores // threads))]


def _steps_of(run: Run) -> list[int]:
    training = run.config.experts.training
    sizes = torch.bincount(run.own_expert, minlength=run.config.experts.count).tolist()
    return [training.duration.steps(max(1, size // training.batch_size)) for size in sizes]


def _is_gpu(place: str) -> bool:
    return not place.startswith("cpu")


def _start(run: Run, number: int, place: str, *, threads: int) -> _Training:
    log_path = run.expert_stage(number).folder / "log.txt"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    gpu = place if _is_gpu(place) else "-1"
    command = [sys.executable, str(SCRIPT), "--run_dir", str(run.folder.path), "--expert_idx", str(number), "--gpu", gpu]
    command += ["--threads", str(threads)]
    if run.config.data.dir is not None:
        command += ["--data_dir", str(run.config.data.dir)]
    # What may change from visit to visit is not in the recorded configuration.
    command += [f"checkpoint_every={run.config.checkpoint_every}", f"evaluation.batch_size={run.config.evaluation.batch_size}"]
    for field in ("workers", "decoded_gb", "decoded_dir"):
        if (value := getattr(run.config.data, field)) is not None:
            command.append(f"data.{field}={value}")
    log = open(log_path, "ab")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    return _Training(number, process, log_path, log)


def _last_lines(path: Path, count: int) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]
