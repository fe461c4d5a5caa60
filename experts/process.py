"""One expert's process, wherever it runs: its command, its log, what its end means; and what a launcher can do."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import NamedTuple, Protocol

from dmoe.command_line import INTERRUPTED, WRONG_INPUT
from dmoe.run import Run

SCRIPT = Path(__file__).resolve().parent.parent / "train_single_expert.py"

TERMINATED = 128 + SIGTERM
"""Exit status of a process that was asked to stop and did so in order."""


class End(NamedTuple):
    """How an expert's process ended.

    Attributes:
        status: its exit status; minus the signal that killed it; None where it was lost together with its worker or node.
    """

    number: int
    status: int | None

    @property
    def interrupted(self) -> bool:
        """Whether somebody wanted it to stop."""
        return self.status in (INTERRUPTED, TERMINATED, -SIGINT, -SIGTERM)

    @property
    def may_be_tried_again(self) -> bool:
        """A user's error would come again, and nobody goes on with what somebody stopped."""
        return not (self.interrupted or self.status in (0, WRONG_INPUT))

    def __str__(self) -> str:
        if self.status is None:
            how = "was lost with its worker"
        elif self.interrupted:
            how = "was interrupted"
        else:
            how = f"failed with status {self.status}" if self.status >= 0 else f"was ended by signal {-self.status}"
        return f"expert {self.number} {how}"


class Launcher(Protocol):
    """A place where experts train: it starts their processes and notices their ends."""

    @property
    def place(self) -> str:
        """Where, and how many at a time, for the user."""
        ...

    @property
    def poll_seconds(self) -> float:
        """How often to ask it."""
        ...

    def start(self, numbers: Sequence[int]) -> int:
        """Start as many of these experts, from the first on, as there is room for; returns how many. Their folders are there."""
        ...

    def ended(self) -> list[End]:
        """Those that ended since this was last asked."""
        ...

    def stop(self) -> None:
        """Have whatever still runs end, and let go of the place."""
        ...


def command(run: Run, *flags: str) -> list[str]:
    """A call of ``train_single_expert.py`` for this run, to be made in the current folder."""
    made = [sys.executable, str(SCRIPT), "--run_dir", str(run.folder.path), *flags]
    if run.config.data.dir is not None:
        made += ["--data_dir", str(run.config.data.dir)]
    # What may change from visit to visit is not in the recorded configuration.
    made += [f"checkpoint_every={run.config.checkpoint_every}", f"evaluation.batch_size={run.config.evaluation.batch_size}"]
    for field in ("workers", "decoded_gb", "decoded_dir"):
        if (value := getattr(run.config.data, field)) is not None:
            made.append(f"data.{field}={value}")
    return made


def log_of(run: Run, number: int) -> Path:
    """Where the expert's process writes what it says."""
    return run.folder.expert(number, {}).folder / "log.txt"


def steps_done(log: Path) -> int:
    """How far the training is that writes this log."""
    found = re.findall(r"^step (\d+)/", "\n".join(last_lines(log, 2)), re.MULTILINE)
    return int(found[-1]) if found else 0


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log without its empty lines; nothing where there is none yet."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][-count:]
