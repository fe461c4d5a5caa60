"""How long it takes to start: the help text, and opening iwildcam at its real size.

    python scripts/benchmark_opening.py

The data set's metadata are made up here, 203,029 rows as in the release, with an empty file for every image: no image is read.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas

ROOT = Path(__file__).resolve().parent.parent

SPLITS = {"train": 129_809, "val": 14_961, "test": 42_791, "id_val": 7_314, "id_test": 8_154}
LOCATIONS = {"train": 243, "val": 32, "test": 48}
CLASSES = 182
PROBE = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from dmoe.data import wilds
imported = time.perf_counter()
dataset = wilds.load("iwildcam", root=Path(sys.argv[1]))
opened = time.perf_counter()
print(f"{imported - began:.1f} {opened - imported:.1f} {sum(len(split) for split in dataset.splits.values())}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for command in (["run.py", "-h"], ["train_single_expert.py", "-h"]):
        seconds = [timed([sys.executable, str(ROOT / command[0]), *command[1:]])[0] for _ in range(options.repeats)]
        print(f"python {' '.join(command)}: {min(seconds):.2f} to {max(seconds):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        write_metadata(Path(folder))
        for _ in range(options.repeats):
            seconds, said = timed([sys.executable, "-c", PROBE, folder])
            imports, opening, images = said.split()
            print(f"iwildcam, {int(images):,} images: opened in {opening} s; imports {imports} s, whole process {seconds:.1f} s")


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds of a whole process, its end included, and what it said."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def write_metadata(root: Path) -> None:
    """The layout of the release, as far as opening it looks."""
    random = np.random.default_rng(0)
    folder = root / "iwildcam_v2.0"
    (folder / "train").mkdir(parents=True)
    (folder / "RELEASE_v2.0.txt").write_text("made up, to time how it is opened\n")
    parts, first = [], 0
    for split, rows in SPLITS.items():
        source = split.removeprefix("id_") if split in LOCATIONS else "train"
        begin = {"train": 0, "val": LOCATIONS["train"], "test": LOCATIONS["train"] + LOCATIONS["val"]}[source]
        number = np.arange(first, first + rows)
        parts.append(
            pandas.DataFrame(
                {
                    "split": split,
                    "filename": [f"{n:08x}-21bc-11ea-a13a-137349068a90.jpg" for n in number],
                    "y": np.concatenate([np.arange(CLASSES), random.integers(0, CLASSES, rows - CLASSES)]),
                    "location_remapped": begin + random.permutation(np.arange(rows) % LOCATIONS[source]),
                    "sequence_remapped": number // 3,
                    "datetime": "2013-06-05 05:44:19.000",
                }
            )
        )
        first += rows
    table = pandas.concat(parts)
    table.to_csv(folder / "metadata.csv")
    for name in table["filename"]:
        (folder / "train" / name).touch()


if __name__ == "__main__":
    main()
