"""How fast images come: the data pipeline against nothing but decoding and resizing, in the same number of processes.

    python scripts/benchmark_loading.py --dataset iwildcam --data_dir data --processes 0 2

All read the same files in the same order, in turn, several times over; what is told is the median and the range of images a
second, the CPU time of an image in all processes together, and the ratio of each to the bare loop's. The bare loop opens, decodes,
converts and resizes, and throws the pictures away where they are. "delivered" images are bytes that have reached the training
process, which is all of the work where a GPU makes floats of them; "ready" ones are standardised floats, made on a core that
reading then lacks; "stored" ones are bytes that have reached it from where decoded images are kept (data.decoded_gb), files of
which the system has the content in memory. The time of starting the processes counts as CPU time only. 0 processes: in the main
process alone. Where other programs run on the machine, the ratio of CPU times is the one to trust.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch
from PIL import Image

from dmoe.config import CONFIG_FOLDER, Config, load_config
from dmoe.data.base import DomainSplit
from dmoe.data.files import ImageFiles
from dmoe.data.registry import load_dataset
from dmoe.data.streams import stored_images, stream
from dmoe.errors import UserError
from dmoe.machine import keep_freed_memory
from dmoe.randomness import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="iwildcam", help="one whose images lie in files")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--images", type=int, default=2000, help="read in one measurement; files are read again where there are fewer"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields")
    options = parser.parse_intermixed_args()
    path = CONFIG_FOLDER / f"{options.dataset}.yaml"
    config = load_config(path, options.overrides, data__dir=str(options.data_dir))
    with tempfile.TemporaryDirectory() as folder:
        compare(options, config, Path(folder))


def compare(options: argparse.Namespace, config: Config, folder: Path) -> None:
    """Measure every side and print it; decoded images are kept in ``folder``."""
    off, on = ({"decoded_gb": gb, "decoded_dir": folder} for gb in (0, 1000))
    dataset = load_dataset(config.dataset, config.data.model_copy(update=off))
    split, stored = dataset.splits["source"], load_dataset(config.dataset, config.data.model_copy(update=on)).splits["source"]
    if not isinstance(split, ImageFiles):
        raise UserError(f"--dataset: the images of {options.dataset} do not lie in files")
    torch.set_num_threads(1)
    keep_freed_memory()
    order = torch.randint(len(split), (options.images,), generator=generator("benchmark"))
    batches = list(order.split(options.batch_size))
    files = [[str(split.path(i)) for i in batch.tolist()] for batch in batches]
    channels, height, width = dataset.image_shape
    if channels != 3:
        raise UserError(f"--dataset: {options.dataset} is no data set of pictures")

    rows = []
    print(
        f"{options.dataset}, {len(order)} images to {height}x{width}, batches of {options.batch_size}, median of {options.repeats}"
    )
    for processes in options.processes:
        read, recall = partial(_pixels, split, batches), partial(_pixels, stored, batches)
        sides: dict[str, Callable[[], Iterator[Any]]] = {
            "bare loop": partial(bare, files, (width, height), processes),
            "delivered": partial(stream, read, start=0, stop=len(batches), workers=processes),
            "ready": partial(stored_images, split, batches, workers=processes),
            "stored": partial(stream, recall, start=0, stop=len(batches), workers=processes),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for repeat in range(options.repeats + 1):
            for name in sorted(sides, reverse=repeat % 2 == 1):  # whoever comes later finds a warmer machine
                cost = measure(sides[name], len(order), options.batch_size)
                if repeat:  # the first time warms the disk up, and decodes what is stored
                    found[name].append(cost)
        rates, milliseconds = ({name: [each[k] for each in costs] for name, costs in found.items()} for k in (0, 1))
        for name in sides:
            fast = statistics.median(rates[name]) / statistics.median(rates["bare loop"])
            cheap = statistics.median(milliseconds["bare loop"]) / statistics.median(milliseconds[name])
            told = f"{_told(rates[name]):>24} images a second, ratio {fast:.2f}"
            print(f"  {processes} processes, {name:<10}{told};  {_told(milliseconds[name], 3):>22} ms of CPU, ratio {cheap:.2f}")
        rows.append({"processes": processes, "images_a_second": rates, "cpu_milliseconds": milliseconds})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(begin: Callable[[], Iterator[Any]], images: int, batch_size: int) -> tuple[float, float]:
    """Images a second after the first batch, by which time every process has begun; milliseconds of CPU an image, of all."""
    cpu_began = _cpu_seconds()
    batches = begin()
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    seconds = time.perf_counter() - began
    return (images - batch_size) / seconds, 1000 * (_cpu_seconds() - cpu_began) / images


def _cpu_seconds() -> float:
    """Of this process and of all that it has started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def bare(files: Sequence[Sequence[str]], size: tuple[int, int], processes: int) -> Iterator[None]:
    """Decoding and resizing by themselves, batch by batch; the pictures are thrown away."""
    if processes == 0:
        for part in files:
            yield decode_some(part, size)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(decode_some, files, [size] * len(files))


def _pixels(split: DomainSplit, batches: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    return split.pixels(batches[number])


def decode_some(paths: Sequence[str], size: tuple[int, int]) -> None:
    for path in paths:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
            if rgb.size != size:
                rgb.resize(size, Image.Resampling.BILINEAR)


def _told(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
