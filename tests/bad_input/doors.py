"""What tests of bad input share: a small run, the doors into the program, a limit on time, and a look at what was changed."""

import hashlib
import importlib
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

import dmoe
from dmoe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 10
OPTIONS = [
    *("checkpoint_every=1", "data.image_size=8", "data.decoded_gb=0", "data.target_domains=[sketch]", "data.workers=0"),
    *("experts.count=2", "experts.training.duration=2 steps", "experts.training.evaluate_every=1 steps"),
    *("aggregator.training.duration=2 steps", "student.training.duration=2 steps", "student.training.evaluate_every=1 steps"),
    *("meta.duration=2 steps", "meta.evaluate_every=1 steps", "meta.support_size=2", "meta.query_size=2"),
]

Door = Callable[[Path], object]


@dataclass(frozen=True)
class Made:
    """A finished run, the pictures it was made from, and the checkpoints that its student had on the way."""

    folder: Path
    pictures: Path
    checkpoints: Path


def make_pictures(folder: Path) -> None:
    """Three domains of two classes, four grey noises each."""
    random = np.random.default_rng(0)
    for domain in ("art", "photo", "sketch"):
        for label in ("cat", "dog"):
            (folder / domain / label).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / domain / label / f"{number}.png")


def make_run(folder: Path, pictures: Path) -> None:
    """All stages, in this process; the checkpoints that a finished stage drops are kept."""
    common = ["--config", str(ROOT / "configs" / "small_pictures.yaml"), "--data_dir", str(pictures), *OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("dmoe.run", "experts.training"):
            patch.setattr(f"{module}.tidy", lambda stage: None)
        for number in ("0", "1"):
            enter("train_single_expert", folder, "--expert_idx", number, *common)
        enter("run", folder, "--load_trained_experts", *common)


def enter(script: str, folder: Path, *arguments: str) -> None:
    """An entry point, as from the command line but for what becomes of its errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--run_dir", str(folder), "--gpu", "-1", "--threads", "1", *arguments])
        importlib.import_module(script).main()


def again(folder: Path) -> None:
    enter("run", folder, "--load_trained_experts")


def evaluated(folder: Path) -> None:
    enter("run", folder, "--test")


def loaded(folder: Path) -> None:
    dmoe.load(folder)


class OverTime(BaseException):
    """Which nothing catches."""


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        raise OverTime(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(door: Callable[[], object]) -> str | None:
    """The line that the user is told; None: it was handled. Everything else is a fault."""
    with in_time():
        try:
            door()
        except UserError as error:
            message = str(error)
            assert message.isprintable() and len(message) <= 5000, message[:200]
            return message
    return None


IGNORED = ("lock", "log.txt", "tensorboard")


def state(*folders: Path) -> dict[str, str]:
    """Of everything there is: what kind it is, and a digest of its content."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if not any(part in IGNORED for part in path.parts):
                found[str(path)] = _content(path)
    return found


def _content(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"  # noqa: PTH115
    if not stat.S_ISREG(mode):
        return f"kind {stat.S_IFMT(mode)}"
    size = path.stat().st_size
    return f"{size} bytes" if size > 1 << 30 else hashlib.sha256(path.read_bytes()).hexdigest()


def changes(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Names of files that are new, gone or other than before."""
    return {Path(path).name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
