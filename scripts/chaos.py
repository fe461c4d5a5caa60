"""Kills a run again and again, goes on each time, and compares the end with that of a run that nothing happened to.

    python scripts/chaos.py --kills 50                          the embedded digits, about twenty minutes on two cores
    python scripts/chaos.py --kills 50 --signal TERM            asked to end, instead of killed
    python scripts/chaos.py --kills 4 --out runs/chaos_short student.training.duration="60 steps"

First the run is made once undisturbed. Then once more, and as often as it is told to, all its processes are killed together: when
the run has reached a random part of its work, the same for the same --seed, and up to a second later. Parts are drawn evenly over
the whole of the work, as the undisturbed run spent its time on it. Told at the end: where the kills fell, whether all weights,
tokens, predictions and results are equal to the bit, and whether anything that was finished or noted was computed again. Exit
status 1 if so, or if anything differs.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.artifacts import digest_of_file, load_tensors, read_json
from dmoe.command_line import run_main
from dmoe.errors import UserError
from dmoe.loop import CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.02
ENDS_WITHIN = 60.0
"""Seconds, after a signal that asks for it."""


class Work:
    """How far a run is, by its folder, in seconds of the undisturbed run."""

    def __init__(self, undisturbed: Path) -> None:
        self._figures = {
            path.parent.relative_to(undisturbed): read_json(path)["figures"] for path in undisturbed.rglob("manifest.json")
        }
        self.all = sum(map(_seconds, self._figures.values()))

    def done(self, folder: Path) -> float:
        return sum(_seconds(figures) * self._part(folder / stage, figures) for stage, figures in self._figures.items())

    def at_work(self, folder: Path) -> str:
        """The stage that the run is in."""
        order = ("experts", "tokens", "aggregator", "student", "meta", "diagnosis")
        unfinished = {stage.parts[0] for stage in self._figures if not (folder / stage / "manifest.json").exists()}
        return next((name for name in order if name in unfinished), "test")

    @staticmethod
    def _part(stage: Path, figures: Mapping[str, Any]) -> float:
        if (stage / "manifest.json").exists():
            return 1.0
        return step_of(stage) / figures["step"] if "step" in figures else 0.0


def _seconds(figures: Mapping[str, Any]) -> float:
    return float(figures.get("seconds", figures["cpu_seconds"]))


def step_of(stage: Path) -> int:
    """Of the last checkpoint; 0 where there is none."""
    try:
        return int(load_tensors(stage / CHECKPOINT)[1]["progress"]["step"])
    except UserError:  # none yet, or it is being replaced
        return 0


@dataclass(frozen=True)
class Noted:
    """What a run had finished or noted when it was killed, and how long its logs were.

    Attributes:
        finished: digests of the manifests.
        begun: steps, or blocks of tokens, by stage.
        logs: bytes.
    """

    finished: Mapping[Path, str]
    begun: Mapping[Path, int]
    logs: Mapping[Path, int]

    @classmethod
    def now(cls, folder: Path, log: Path) -> "Noted":
        finished = {path: digest_of_file(path) for path in folder.rglob("manifest.json")}
        begun = {path.parent: step_of(path.parent) for path in folder.rglob(CHECKPOINT)}
        begun |= {path.parent: len(read_json(path)["sha256"]) for path in folder.rglob("partial.0.json")}
        begun = {stage: count for stage, count in begun.items() if count and stage / "manifest.json" not in finished}
        logs = {path: path.stat().st_size for path in (log, *folder.rglob("log.txt"))}
        return cls(finished, begun, logs)

    def twice(self, log: Path) -> list[str]:
        """What was done again afterwards, though it was there."""
        again = [
            f"{path.parent} was finished, and made again" for path, was in self.finished.items() if digest_of_file(path) != was
        ]
        for stage, count in self.begun.items():
            own = stage / "log.txt" if (stage / "log.txt").exists() else log
            with open(own, "rb") as file:
                file.seek(self.logs.get(own, 0))
                said = file.read().decode(errors="replace")
            found = re.search(rf"{stage.name}(?: images)?: going on after (?:step )?(\d+) of", said)
            if found is None or int(found[1]) < count:
                again.append(f"{stage} was at {count}, and went on after {found[1] if found else 'nothing'}")
        return again


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="KILL: every process of the run at once")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields")
    options = parser.parse_intermixed_args(arguments)
    undisturbed, disturbed = options.out / "undisturbed", options.out / "disturbed"
    options.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "run.py", "--dataset", options.dataset, *options.overrides, "--run_dir"]
    began = time.monotonic()
    process = _start([*command, str(undisturbed.absolute())], options.out / "undisturbed.txt")
    if process.wait():
        raise UserError(f"{options.out / 'undisturbed.txt'}: the undisturbed run failed with status {process.returncode}")
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)

    shutil.rmtree(disturbed, ignore_errors=True)
    log = options.out / "disturbed.txt"
    log.unlink(missing_ok=True)
    began = time.monotonic()
    work = Work(undisturbed)
    chance = random.Random(options.seed)
    moments = sorted(chance.random() * work.all for _ in range(options.kills))
    faults: list[str] = []
    kills: list[Noted] = []
    fell: Counter[str] = Counter()
    for number, moment in enumerate(moments, 1):
        process = _start([*command, str(disturbed.absolute())], log)
        while process.poll() is None and work.done(disturbed) < moment:
            time.sleep(POLL_SECONDS)
        time.sleep(chance.random())
        if process.poll() is not None:
            faults.append(f"{log}: visit {number} ended by itself, with status {process.returncode}, before it could be killed")
            break
        stage = work.at_work(disturbed)
        fell[stage] += 1
        faults += _end(process, options.signal)
        kills.append(Noted.now(disturbed, log))
        part = work.done(disturbed) / work.all
        print(f"kill {number} of {options.kills}: in {stage}, after {part:.0%} of the work", flush=True)
    process = _start([*command, str(disturbed.absolute())], log)
    if process.wait():
        raise UserError(f"{log}: the last visit failed with status {process.returncode}")
    again = [fault for kill in kills for fault in kill.twice(log)]
    faults += [*again, *different(undisturbed, disturbed)]
    stages = ", ".join(f"{name} {count}" for name, count in fell.items())
    print(f"disturbed: {time.monotonic() - began:.0f} s; kills by stage: {stages}")
    there = sum(len(kill.finished) + len(kill.begun) for kill in kills)
    print(f"finished or noted at the kills, all together: {there}; of these done again: {len(again)}")
    print("\n".join(faults) or "all weights, tokens, predictions and results are equal to the bit")
    sys.exit(1 if faults else 0)


def _start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """In a group of processes of its own, which ends with it."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _end(process: "subprocess.Popen[bytes]", how: str) -> list[str]:
    """Kill the whole group, or ask the run to end; returns what is wrong with its end."""
    wanted = signal.Signals[f"SIG{how}"]
    if how == "KILL":
        os.killpg(process.pid, wanted)
        process.wait()
        return []
    process.send_signal(wanted)
    try:
        status = process.wait(timeout=ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return [f"asked to end by {wanted.name}, the run went on for {ENDS_WITHIN:.0f} s"]
    return [] if status in (0, 128 + wanted) else [f"asked to end by {wanted.name}, it ended with status {status}"]


def different(one: Path, other: Path) -> list[str]:
    """Files of weights, tokens, predictions and results that are not equal to the bit."""
    kinds = ("weights.safetensors", "tokens.npy", "*.csv", "results.jsonl", "model.json", "ranges.json")
    ours, theirs = (
        {p.relative_to(folder): digest_of_file(p) for kind in kinds for p in folder.rglob(kind)} for folder in (one, other)
    )
    return [f"{name} differs" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


if __name__ == "__main__":
    run_main(main)
