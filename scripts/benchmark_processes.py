"""How much faster several processes meta-train than one, on the same cores.

    python scripts/benchmark_processes.py                                        the embedded digits, two processes
    python scripts/benchmark_processes.py --processes 4 student.backbone.name=resnet18 experts.backbone.name=resnet18

One run is prepared up to meta-training, with few steps; then meta-training is done from there by one process with all cores, by one
with a single thread, and by several with a single thread each, as torchrun starts them, in turn, several times over. Told are
episodes a second by the clock, median and range, and whether the weights are equal to the bit: those by one thread each are.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.artifacts import digest_of_file, read_json
from dmoe.command_line import run_main
from dmoe.errors import UserError
from dmoe.machine import cores, processor

ROOT = Path(__file__).resolve().parent.parent
FEW = [
    "data.source_images_per_domain=300",
    "experts.training.duration=2 steps",
    "aggregator.training.duration=2 steps",
    "student.training.duration=2 steps",
    "meta.evaluate_every=100000 steps",
]
EPISODES = 4
"""In an update; the processes share them."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields")
    options = parser.parse_intermixed_args(arguments)
    fields = [*FEW, f"meta.duration={options.updates} steps", f"meta.domains_per_update={EPISODES}", *options.overrides]
    program = ["run.py", "--dataset", options.dataset, "--gpu", "-1", *fields]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    ways = {
        f"1 process, {cores()} threads": ["--threads", str(cores())],
        "1 process, 1 thread": ["--threads", "1"],
        f"{options.processes} processes, 1 thread each": ["--threads", "1"],
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    weights: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        begun = Path(place) / "begun"
        _run([*program, "--threads", "1", "--run_dir", str(begun)])
        shutil.rmtree(begun / "meta")
        for _ in range(options.rounds):
            for way, flags in ways.items():
                folder = Path(place) / "run"
                shutil.copytree(begun, folder)
                _run([*(torchrun if way.startswith(f"{options.processes} ") else []), *program, *flags, "--run_dir", str(folder)])
                figures = read_json(folder / "meta" / "manifest.json")["figures"]
                rates[way].append(EPISODES * options.updates / figures["seconds"])
                weights[way] = digest_of_file(folder / "meta" / "weights.safetensors")
                shutil.rmtree(folder)
    print(f"{options.dataset}, {options.updates} updates of {EPISODES} episodes, {processor()}, {cores()} cores")
    first = statistics.median(next(iter(rates.values())))
    for way, found in rates.items():
        middle = statistics.median(found)
        print(
            f"  {way:<30}{middle:8.1f} ({min(found):.1f} to {max(found):.1f}) episodes a second, {middle / first:.2f} of the first"
        )
    one, several = list(weights.values())[1:]
    print("weights by one thread each: " + ("equal to the bit" if one == several else "different"))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])} ended with status {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])}")


if __name__ == "__main__":
    run_main(main)
