"""How fast images come: the data pipeline against nothing but decoding and resizing, in the same number of processes.

    python scripts/benchmark_loading.py --dataset iwildcam --data_dir data --processes 0 2

Both read the same files in the same order, in turn, several times over; what is told is the median and the range of images a
second, and the ratio to the bare loop. "delivered" images are bytes that have reached the training process, which is all of the
work where a GPU makes floats of them; "ready" ones are standardised floats, made on a core that reading then lacks. The time of
starting the processes does not count. 0 processes: in the main process alone.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch
from PIL import Image
from torch import Tensor

from dmoe.config import CONFIG_FOLDER, load_config
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
    dataset = load_dataset(config.dataset, config.data)
    split = dataset.splits["source"]
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
        rates: dict[str, list[float]] = {"delivered": [], "ready": [], "bare loop": []}
        for _ in range(options.repeats + 1):
            rates["delivered"].append(rate(stream(partial(_pixels, split, batches), start=0, stop=len(batches), workers=processes)))
            rates["ready"].append(rate(stored_images(split, batches, workers=processes)))
            rates["bare loop"].append(sum(map(len, files[1:])) / decode(files, (width, height), processes))
        found = {name: values[1:] for name, values in rates.items()}  # the first of each warms the disk up
        bare = statistics.median(found["bare loop"])
        for name, values in found.items():
            ratio = statistics.median(values) / bare
            print(f"  {processes} processes, {name:<10}{_told(values):>28} images a second, ratio {ratio:.2f}")
        rows.append({"processes": processes, **found})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def rate(batches: Iterator[Tensor]) -> float:
    """Images a second after the first batch, by which time every process has begun."""
    next(batches)
    began = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    return count / (time.perf_counter() - began)


def decode(files: Sequence[Sequence[str]], size: tuple[int, int], processes: int) -> float:
    """Seconds that decoding and resizing take by themselves, after the first batch; the pictures are thrown away."""
    if processes == 0:
        done = (decode_some(part, size) for part in files)
        next(done)
        began = time.perf_counter()
        list(done)
        return time.perf_counter() - began
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(decode_some, files, [size] * len(files))
        next(results)
        began = time.perf_counter()
        list(results)
        return time.perf_counter() - began


def _pixels(split: ImageFiles, batches: Sequence[Tensor], number: int) -> Tensor:
    return split.pixels(batches[number])


def decode_some(paths: Sequence[str], size: tuple[int, int]) -> None:
    for path in paths:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
            if rgb.size != size:
                rgb.resize(size, Image.Resampling.BILINEAR)


def _told(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
