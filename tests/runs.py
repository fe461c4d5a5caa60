"""Small runs of the entry points on the embedded digits, in processes of their own."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dmoe.artifacts import load_tensors
from dmoe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = 3
SMALL = [
    "checkpoint_every=5",
    "data.source_images_per_domain=150",
    f"experts.count={EXPERTS}",
    "experts.training.duration=30 steps",
    "experts.training.evaluate_every=15 steps",
    "aggregator.training.duration=30 steps",
    "student.training.duration=40 steps",
    "student.training.evaluate_every=20 steps",
    "meta.duration=24 steps",
    "meta.evaluate_every=12 steps",
    "meta.inner_lr=0.1",  # after so little training, larger steps blow rounding up
]


def start(script: str, folder: Path, *arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, script, "--run_dir", str(folder), "--gpu", "-1", "--threads", str(threads), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What a process says that is to end well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for_checkpoint(process: subprocess.Popen[str], stage: Path, step: int) -> None:
    """Return as soon as the stage's checkpoint has reached that step."""
    path, began = stage / "checkpoint.safetensors", time.monotonic()
    while time.monotonic() - began < 120:
        if path.exists() and step_of(path) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint of step {step} in {stage}")


def step_of(checkpoint: Path) -> int:
    try:
        return int(load_tensors(checkpoint)[1]["progress"]["step"])
    except UserError:  # tidied away meanwhile, or replaced by the next
        return 0 if checkpoint.exists() else 10**9


def kill_at(process: subprocess.Popen[str], stage: Path, step: int) -> None:
    wait_for_checkpoint(process, stage, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (stage / "manifest.json").exists(), "it was too late: the stage is finished"


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("weights.safetensors")}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def forget(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
