"""Experts as an array job of Slurm: a script that anybody can submit, and here its submission.

All nodes share the file system of the run folder, the data and the current folder, and have the same Python at the same path.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoe.artifacts import written_whole
from dmoe.command_line import INTERRUPTED
from dmoe.errors import UserError
from dmoe.run import Run
from experts.process import TERMINATED, End, command, log_of

SETTLE_SECONDS = 60.0
"""How long after the job's end a file may still appear that one of its tasks wrote on another node."""


@dataclass
class _Job:
    """An array job: the waiting ``sbatch``, and the experts of which it has not been heard yet."""

    name: str
    process: subprocess.Popen[str]
    experts: list[int]
    over_since: float | None = None


class Slurm:
    """Array jobs, submitted by ``sbatch --wait``. Lost nodes are Slurm's business: it queues their tasks again.

    Args:
        gpu: -1: none; otherwise a GPU an expert.
    """

    poll_seconds = 1.0
    place = "as an array job of Slurm"

    def __init__(self, run: Run, *, gpu: int | None) -> None:
        self._run, self._gpu = run, gpu != -1
        self._script = run.folder.path / "experts" / "experts.sbatch"
        self._jobs: list[_Job] = []

    def start(self, numbers: Sequence[int]) -> int:
        """Submit one array job of all of them.

        Raises:
            UserError: a path cannot be written into a script; or there is no ``sbatch`` here: the script is written then, and
                the line says what to type.
        """
        for number in numbers:
            _status_file(log_of(self._run, number).parent).unlink(missing_ok=True)
        with written_whole(self._script) as beside:
            beside.write_text(script(self._run, numbers, gpu=self._gpu), encoding="utf-8")
        if shutil.which("sbatch") is None:
            typed = shlex.join(["sbatch", "--wait", str(self._script)])
            raise UserError(
                f"--launcher slurm: no sbatch on the PATH: where Slurm is, type: {typed}; after its end, this command again"
            )
        name = f"experts-{os.getpid()}-{time.time_ns():x}"  # by which the job can be cancelled
        process = subprocess.Popen(
            ["sbatch", "--wait", "--parsable", f"--job-name={name}", str(self._script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._jobs.append(_Job(name, process, list(numbers)))
        return len(numbers)

    def ended(self) -> list[End]:
        ends = []
        for job in list(self._jobs):
            if job.over_since is None and job.process.poll() is not None:
                out, err = job.process.communicate()
                if not out.strip():
                    raise UserError(f"--launcher slurm: sbatch refused {self._script}: {' '.join(err.split())}")
                job.over_since = time.monotonic()
            for number in list(job.experts):
                status = self._status(number, job)
                if status is not None:
                    job.experts.remove(number)
                    ends.append(End(number, status))
            if job.over_since is not None and not job.experts:
                self._jobs.remove(job)
        return ends

    def stop(self) -> None:
        for job in self._jobs:
            if job.experts and job.process.poll() is None and shutil.which("scancel") is not None:
                subprocess.run(["scancel", f"--name={job.name}"], stdin=subprocess.DEVNULL, check=False)
            if job.process.poll() is None:
                job.process.terminate()
                job.process.wait()

    def _status(self, number: int, job: _Job) -> int | None:
        """The exit status of an expert's process, None while it is not known."""
        path = _status_file(log_of(self._run, number).parent)
        if path.exists():
            status = int(path.read_text(encoding="utf-8"))
            path.unlink()
            return status if status <= 128 else 128 - status  # as the shell tells a signal
        if job.over_since is None:
            return None
        if job.process.returncode == 0:
            return 0
        # Cancelled or out of time: Slurm ended the script with the process, or the script left no status on purpose.
        return TERMINATED if time.monotonic() - job.over_since > SETTLE_SECONDS else None


def script(run: Run, numbers: Sequence[int], *, gpu: bool) -> str:
    """The text of an array job that trains these experts.

    Raises:
        UserError: a path in it has a backslash or a control character, which ``sbatch`` reads otherwise than a shell.
    """
    config, folder = run.config.experts, (run.folder.path / "experts").absolute()
    own_gpu = gpu and not any(option.startswith(("--gres", "--gpus", "-G")) for option in config.slurm_options)
    log = str(folder).replace("%", "%%") + "/expert_%2a/log.txt"
    options = [
        "--job-name=experts",
        f"--array={','.join(str(number) for number in numbers)}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}",
        f"--cpus-per-task={config.threads}",
        *(["--gres=gpu:1"] if own_gpu else []),
        *config.slurm_options,  # of two that say different things, the later one counts
    ]
    train = shlex.join(command(run, "--gpu", "0" if gpu else "-1"))
    # The number of threads changes a CPU's rounding, but not a GPU's.
    threads = f'"${{SLURM_CPUS_PER_TASK:-{config.threads}}}"' if gpu else str(config.threads)
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(option)}" for option in options),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit",
        f'expert={shlex.quote(str(folder))}/expert_$(printf %02d "$SLURM_ARRAY_TASK_ID")',
        '[ -d "$expert" ] || exit # this node does not share the file system',
        f'{train} --threads {threads} --expert_idx "$SLURM_ARRAY_TASK_ID"',
        "status=$?",
        "# Whoever interrupts an expert, or queues it again, ends this script too.",
        f"case $status in {INTERRUPTED} | {TERMINATED}) exit $status ;; esac",
        'echo $status > "$expert/status.part" && mv "$expert/status.part" "$expert/status"',
        "exit $status",
    ]
    for line in lines:
        if "\\" in line or not line.isprintable():
            raise UserError(f"--launcher slurm: backslashes and control characters do not fit into its script: {line!r}")
    return "\n".join(lines) + "\n"


def _status_file(folder: Path) -> Path:
    """Where a task tells its exit status; taken away as soon as it is read."""
    return folder / "status"
