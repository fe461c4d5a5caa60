"""All experts of a run, side by side: which of them wait, where they train, which are tried again, and what is said of it."""

import time
from collections import Counter
from pathlib import Path

import torch

from dmoe.console import progress_bar, say
from dmoe.errors import UserError
from dmoe.run import Run
from experts.local import Local
from experts.process import End, Launcher, last_lines, log_of, steps_done

LOG_LINES_SHOWN = 5

SHARED_SECONDS = 60.0
"""A network file system may show a file so much later than it was written on another node."""


def train_all_experts(run: Run, *, launcher: str = "local", gpu: int | None = None, threads: int | None = None) -> None:
    """Train every expert that is not finished yet.

    Args:
        launcher: ``local``: on this machine; ``ray``: on a Ray cluster; ``slurm``: as an array job.
        gpu: -1: none; None: what is there. On this machine also the one GPU to use.
        threads: CPU threads for all trainings on this machine together; None: every core.

    Raises:
        UserError: a training failed for good; the others were finished first, and the line shows the end of its log. Or the
            launcher is not to be had.
    """
    count = run.config.experts.count
    waiting = [number for number in range(count) if run.expert_stage(number).finished() is None]
    if not waiting:
        say(f"experts: all {count} already finished from the same inputs ({run.folder.path / 'experts'})")
        return
    for number in waiting:
        log_of(run, number).parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    chosen = _launcher(run, launcher, gpu=gpu, threads=threads)
    try:
        say(f"experts: {len(waiting)} of {count} to train, {chosen.place}")
        _train(run, waiting, chosen)
    finally:
        chosen.stop()
    say(f"experts: {time.perf_counter() - began:.0f} s in all")


def _launcher(run: Run, name: str, *, gpu: int | None, threads: int | None) -> Launcher:
    if name == "ray":
        from experts.ray_cluster import RayCluster

        return RayCluster(run, gpu=gpu)
    if name == "slurm":
        from experts.slurm import Slurm

        return Slurm(run, gpu=gpu)
    return Local(run, gpu=gpu, threads=threads)


def _train(run: Run, waiting: list[int], launcher: Launcher) -> None:
    """Keep the launcher busy until each of the waiting experts is finished or has failed for good."""
    steps, tries, running, failed = _steps_of(run), Counter[int](), set[int](), list[End]()
    total, ended_steps = sum(steps[number] for number in waiting), 0
    with progress_bar("experts", total=total) as bar:
        while waiting or running:
            started = launcher.start(waiting) if waiting else 0
            running |= set(waiting[:started])
            tries.update(waiting[:started])
            waiting = waiting[started:]
            time.sleep(launcher.poll_seconds)
            for end in launcher.ended():
                running.remove(end.number)
                if end.may_be_tried_again and tries[end.number] <= run.config.experts.retries:
                    say(f"{end}; goes on from its last checkpoint, retry {tries[end.number]} of {run.config.experts.retries}")
                    waiting.append(end.number)
                    continue
                ended_steps += steps[end.number]
                if end.status != 0:
                    failed.append(end)
                else:
                    _check_it_is_here(run.expert_stage(end.number).manifest)
                    for line in last_lines(log_of(run, end.number), 1):
                        say(line)
            bar.n = ended_steps + sum(steps_done(log_of(run, number)) for number in running)
            bar.refresh()
    if failed:
        first = failed[0]
        log = log_of(run, first.number)
        raise UserError(
            f"{first}"
            + (f" after {tries[first.number]} tries" if tries[first.number] > 1 else "")
            + (f", and {len(failed) - 1} more" if len(failed) > 1 else "")
            + f"; the finished ones are kept. The end of {log}: {' | '.join(last_lines(log, LOG_LINES_SHOWN))}"
        )


def _check_it_is_here(manifest: Path) -> None:
    began = time.monotonic()
    while not manifest.exists():
        if time.monotonic() - began > SHARED_SECONDS:
            raise UserError(f"{manifest}: written elsewhere, but not here: all nodes must share the file system of the run folder")
        time.sleep(0.2)


def _steps_of(run: Run) -> list[int]:
    training = run.config.experts.training
    sizes = torch.bincount(run.own_expert, minlength=run.config.experts.count).tolist()
    return [training.duration.steps(max(1, size // training.batch_size)) for size in sizes]
