"""Small experts of the embedded digits, and their processes."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmoe.artifacts import load_tensors
from dmoe.command_line import open_run, parser
from dmoe.errors import UserError
from dmoe.run import Run

EXPERTS = 6
SMALL = [
    "checkpoint_every=5",
    "data.source_images_per_domain=80",
    f"experts.count={EXPERTS}",
    "experts.training.duration=60 steps",
    "experts.training.evaluate_every=60 steps",
]

Weights = dict[str, bytes]


def open_small(folder: Path, *overrides: str) -> Run:
    """The small run in a folder; no expert is trained yet."""
    flags = ["--run_dir", str(folder), "--gpu", "-1", "--threads", "1"]
    return open_run(parser("", epilog="").parse_intermixed_args([*flags, *SMALL, *overrides]))


def weights_of(folder: Path) -> Weights:
    """The weights of all finished experts of a run."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("experts/expert_*/weights.safetensors")}


def processes_of(folder: Path, number: int) -> list[int]:
    """Ids of the processes that train an expert of the run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        wanted = {"--run_dir": str(folder), "--expert_idx": str(number)}
        if all(flag in words and words[words.index(flag) + 1] == value for flag, value in wanted.items()):
            found.append(int(process.name))
    return found


def parent_of(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


def step_of(checkpoint: Path) -> int:
    try:
        return int(load_tensors(checkpoint)[1]["progress"]["step"])
    except (OSError, UserError):
        return 0


@contextmanager
def killing(folder: Path, number: int, *, at: int, signal: int, parent: bool = False) -> Iterator[None]:
    """Meanwhile, the process of that expert, or its parent, gets a signal once its checkpoint has reached that step.

    At the end it is checked that this was in time.
    """
    stage, killed, over = folder / "experts" / f"expert_{number:02d}", [], threading.Event()

    def kill() -> None:
        while not over.is_set():
            if step_of(stage / "checkpoint.safetensors") >= at:
                process = processes_of(folder, number)[0]
                os.kill(parent_of(process) if parent else process, signal)
                killed.append((stage / "manifest.json").exists())
                return
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert killed == [False], "it was not killed in the middle of its training"
